"""What every result file says about where it was measured."""

import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mixwright.evaluation.table import Table, markdown

REFERENCE = "PHATGOOSE"


def surroundings(started: float) -> dict[str, Any]:
    """Machine, versions, threads, the command, and the CPU time since `started` (of `time.process_time`)."""
    script = sys.argv[0].rsplit("/", 1)[-1].removesuffix(".py")
    return {
        "command": " ".join(["python", "-m", f"benchmarks.{script}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"processor": _processor(), "system": platform.system(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "transformers")},
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a result with its numbers to five digits."""
    rounded = json.loads(json.dumps(result), parse_float=lambda text: round(float(text), 5))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded, separators=(",", ":")).replace('},"', '},\n"') + "\n")


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        return f"{names[0]} ({len(names)} cores)"
    except (OSError, IndexError):
        return platform.processor()


def summary(table: Table, chosen: dict[int, Any], shown: str) -> dict[str, Any]:
    """What is kept of a table: means with intervals, paired differences to plain PHATGOOSE, means of each seed."""
    kept: dict[str, Any] = {"chosen_on_validation": chosen, "systems": {}}
    for metric in table.metrics:
        means, gaps = table.intervals(metric), table.differences(metric, REFERENCE)
        for system, mean in means.items():
            kept["systems"].setdefault(system, {})[metric] = {
                "mean": mean.value, "low": mean.low, "high": mean.high, "stderr": mean.stderr, "n": mean.n,
                "minus_phatgoose": [gaps[system].value, gaps[system].low, gaps[system].high],
                "by_seed": [table.means(metric, seed=seed)[system] for seed in sorted({s.seed for s in table.scores})],
                "by_task": {task: table.means(metric, [task])[system] for task in table.tasks},
            }  # fmt: skip
    kept["markdown"] = markdown(*table.rows(shown, REFERENCE))
    return kept
