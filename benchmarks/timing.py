"""Timing that survives a busy machine: every contender in every round, medians, and the quickest runs beside them."""

import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.record import surroundings
from mixwright.ops import kernels

RESULTS = Path(__file__).parent / "results"
Run = Callable[[], object]


def alternate(runs: Mapping[str, Run], *, rounds: int, slow: float = 0.25, cpu: bool = False) -> dict[str, list[float]]:
    """Seconds of every run in every round, each round beginning with another contender.

    `cpu` counts the processor time of this process instead, which other people's work on the machine leaves almost
    alone; it says how long one thread would take on a quiet machine, and nothing about two.
    One that took longer than `slow` seconds when it was warmed up runs in every tenth round only, but at least thrice.
    """
    clock = time.process_time if cpu else time.perf_counter
    warm: dict[str, float] = {}
    for name, run in runs.items():
        run()
        warm[name] = _once(run, clock)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    gc.disable()
    try:
        for number in range(rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                if warm[name] <= slow or number % 10 == 0 or number < 3:
                    seconds[name].append(_once(runs[name], clock))
    finally:
        gc.enable()
    return seconds


def _once(run: Run, clock: Callable[[], float]) -> float:
    start = clock()
    run()
    return clock() - start


def summary(seconds: Mapping[str, list[float]], reference: str) -> dict[str, dict[str, float]]:
    """Milliseconds (median, quartiles, least) of each contender and what it takes relative to the reference."""
    base = seconds[reference]
    result: dict[str, dict[str, float]] = {}
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
        result[name] = {
            "runs": len(values),
            "median_ms": 1e3 * middle,
            "quartile1_ms": 1e3 * low,
            "quartile3_ms": 1e3 * high,
            "least_ms": 1e3 * min(values),
            "ratio_of_medians": middle / statistics.median(base),
            "ratio_of_least": min(values) / min(base),
            "added_ms": 1e3 * (middle - statistics.median(base)),
            "added_least_ms": 1e3 * (min(values) - min(base)),
        }
    return result


def peak_bytes(run: Run) -> int:
    """The most memory that torch held at once during `run`, beyond what it held before, what is returned included."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = run()
    del kept
    recorded = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in recorded if event.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def machine(started: float) -> dict[str, Any]:
    """What the numbers were measured on, and how busy it was."""
    return {
        **surroundings(started),
        "peft": version("peft") if find_spec("peft") else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "dispatch": kernels.status().replace(str(Path.home()), "~"),
        "load": [round(value, 2) for value in os.getloadavg()],
    }


def write(name: str, content: Mapping[str, Any]) -> Path:
    """Keep `content` with the machine as `benchmarks/results/<name>.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def show(title: str, result: Mapping[str, Mapping[str, float]], notes: Mapping[str, str] | None = None) -> None:
    """One table: a row for each contender, one for each that was left out, with the reason."""
    table = Table(title=title, title_justify="left")
    for heading in ("", "median ms", "quartiles", "least ms", "x reference", "x (least)", "added ms", "runs"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, row in result.items():
        table.add_row(
            name,
            f"{row['median_ms']:.3f}",
            f"{row['quartile1_ms']:.3f} - {row['quartile3_ms']:.3f}",
            f"{row['least_ms']:.3f}",
            f"{row['ratio_of_medians']:.2f}",
            f"{row['ratio_of_least']:.2f}",
            f"{row['added_ms']:.3f}",
            str(row["runs"]),
        )
    for name, note in (notes or {}).items():
        table.add_row(name, note, *[""] * 6)
    Console(width=120).print(table)
