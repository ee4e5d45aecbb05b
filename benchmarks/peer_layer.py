"""A PEER layer against PEER-pytorch on the same weights, and against the memory's own limit for rows in random order.

    python -m benchmarks.peer_layer [--quick] [--cpu-time] [--only 512x1024 float32] [--again]
    python -m benchmarks.peer_layer --report     # the tables of the method's README, from the stored result

8 heads of 16 experts, softmax gates, 128 numbers in half a key, one thread. Every grid, width and type has a process of
its own, in which contenders alternate; it runs without and with THP_MEM_ALLOC_ENABLE=1, torch's switch for huge pages.
What is measured is kept at once: a run that was cut off goes on where it was.

`forward` is without gradients, in eval mode; `step` is forward, backward with all gradients, and the optimiser:
fused AdamW for PEER-pytorch; for ours LazyAdamW, which gives what AdamW gives, or RowwiseAdagrad. `experts` is the
expert phase alone on evenly drawn ids, `limit` the reading of the same rows alone, `route` the retrieval alone.

Bars: forward at 256 and 2048 tokens 2.5x and at 1 token never slower; a step 4x, from 512^2 experts and up to 256
tokens 6x, with 1024^2 and up to 256 tokens 10x; forward under 5 MB beside its result; experts within 1.6x of the limit
at 512^2 experts of width 1024; plain torch never slower than PEER-pytorch.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.gather_rows import gathers
from benchmarks.peer_contenders import (
    ADAGRAD,
    ADAMW,
    LAZY,
    OURS,
    PAIRS,
    PLAIN,
    THEIRS,
    Layers,
    grown,
    off,
    trained,
)  # fmt: skip
from benchmarks.peer_tables import report, verdict
from benchmarks.timing import RESULTS, machine, peak_bytes

SIDES, WIDTHS, TYPES = (128, 512, 1024), (256, 1024), ("float32", "bfloat16")
SECONDS, QUICK_SECONDS, MOST = 5.0, 1.5, 25
Runs = Mapping[str, Callable[[], object]]


def alternate(runs: Runs, seconds: float, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Milliseconds of each contender, each round begun by another; as many rounds as fit, and at least two."""

    def once(run: Callable[[], object]) -> float:
        start = clock()
        run()
        return 1e3 * (clock() - start)

    warm = sum(once(run) for run in runs.values())
    if warm < 1e3 * seconds / 8:
        warm = sum(once(run) for run in runs.values())
    rounds = max(2, min(MOST, int(1e3 * seconds / max(warm, 1e-3))))
    found: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    gc.disable()
    try:
        for number in range(rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                found[name].append(once(runs[name]))
    finally:
        gc.enable()
    return found


def thin(times: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Median and least milliseconds, and the number of runs."""
    return {
        name: [round(statistics.median(values), 4), round(min(values), 4), len(values)]
        for name, values in times.items()
        if values
    }


class Group:
    """Everything measured at one grid, width and type."""

    def __init__(self, side: int, dim: int, dtype: str, tokens: list[int], seconds: float, cpu: bool) -> None:
        self.tokens = tokens
        self.side, self.dim, self.type = side, dim, getattr(torch, dtype)
        self.seconds, self.clock = seconds, time.process_time if cpu else time.perf_counter
        self.room = 0.93 * _available()
        self.table = 2 * side * side * dim * self.type.itemsize
        self.state = 2 * side * side * dim * 4
        self.result: dict[str, Any] = {"forward": {}, "step": {}, "extra_mb": {}, "step_mb": {}, "left_out": {}}

    def measure(self, forward: bool, step: bool) -> dict[str, Any]:
        layers = Layers(self.side, self.dim, self.type)
        if self.fits("forward", THEIRS, 2 * self.table):
            layers.add_theirs()
            self.result["difference"] = layers.check()
        for tokens in self.tokens if forward else ():
            self.forward(layers, tokens)
        if step:
            self.steps(layers)
        return self.result

    def fits(self, what: str, name: str, needed: float) -> bool:
        if needed > self.room:
            self.result["left_out"][f"{what}, {name}"] = f"needs about {needed / 2**30:.0f} GiB"
        return needed <= self.room

    def gathered(self, tokens: int) -> int:
        """Bytes of PEER-pytorch's `(tokens, experts, width)`, of which it holds a few."""
        return tokens * PAIRS * self.dim * self.type.itemsize

    def forward(self, layers: Layers, tokens: int) -> None:
        with torch.no_grad():
            runs = layers.forwards(tokens)
            if not self.fits(f"forward at {tokens}", THEIRS, 2 * self.table + 4 * self.gathered(tokens)):
                runs.pop(THEIRS, None)
            times = thin(alternate(runs, self.seconds, self.clock))
            reads = gathers(layers.ours.experts.table.rows, layers.ids(tokens))  # type: ignore[arg-type]
            limit = thin(alternate({**reads, "experts": runs["experts"]}, self.seconds / 4, self.clock))
            times["experts"] = limit.pop("experts")
            times["limit"] = min(limit.values())
            self.result["forward"][tokens] = times
            result = tokens * self.dim * self.type.itemsize
            measured = [name for name in (OURS, PLAIN, THEIRS) if name in runs and (tokens > 1 or name == OURS)]
            self.result["extra_mb"][tokens] = {n: round((peak_bytes(runs[n]) - result) / 1e6, 2) for n in measured}

    def steps(self, layers: Layers) -> None:
        """Side by side where all fits into memory, else one after another."""
        for tokens in self.tokens:
            touched = min(1.0, tokens * PAIRS / self.side**2)
            theirs = 4 * self.table + 5 * self.gathered(tokens)
            ours = (1 + touched) * self.table + touched * self.state
            together = theirs + ours + 3 * touched * self.table
            alone = self.fits(f"step at {tokens}", THEIRS, theirs + (0 if layers.theirs is None else self.table))
            times: dict[str, list[float]] = {}
            if layers.theirs is None or not alone:
                times |= self.ours(layers, tokens)
            elif together <= self.room:
                times |= self.run({**self.of_theirs(layers, tokens), **self.of_ours(layers, tokens)}, tokens)
            else:
                self.result["left_out"][f"step at {tokens}, side by side"] = "one after another, for want of memory"
                times |= self.run(self.of_theirs(layers, tokens), tokens)
                times |= self.ours(layers, tokens)
            self.result["step"][tokens] = times

    def ours(self, layers: Layers, tokens: int) -> dict[str, list[float]]:
        touched = min(1.0, tokens * PAIRS / self.side**2)
        held = (1 + (layers.theirs is not None) + touched) * self.table
        lazy = self.fits(f"step at {tokens}", LAZY, held + touched * self.state)
        if not self.fits(f"step at {tokens}", ADAGRAD, held):
            return {}
        return self.run(self.of_ours(layers, tokens, lazy=lazy), tokens)

    def run(self, runs: Runs, tokens: int) -> dict[str, list[float]]:
        times = thin(alternate(runs, self.seconds, self.clock))
        if tokens > 1:
            held = self.result["step_mb"].setdefault(tokens, {})
            held |= {name: round(grown(run) / 1e6, 1) for name, run in runs.items() if PLAIN not in name}
        return times

    def of_theirs(self, layers: Layers, tokens: int) -> Runs:
        assert layers.theirs is not None
        optimizer = torch.optim.AdamW(layers.theirs.parameters(), lr=1e-5, fused=True)
        return {f"{THEIRS}, {ADAMW}": trained(layers.theirs, optimizer, layers.input(tokens, grad=True))}

    def of_ours(self, layers: Layers, tokens: int, lazy: bool = True) -> Runs:
        import mixwright as mw

        runs: dict[str, Callable[[], object]] = {}
        x = layers.input(tokens, grad=True)
        by_rows = layers.twin()
        runs[f"{OURS}, {ADAGRAD}"] = trained(by_rows, mw.RowwiseAdagrad(by_rows, lr=1e-5, table_lr=1e-5), x)
        if lazy:
            exact = layers.twin()
            exact_step = trained(exact, mw.LazyAdamW(exact, lr=1e-5), x)
            runs[f"{OURS}, {LAZY}"] = exact_step
            runs[f"{PLAIN}, {LAZY}"] = off(exact_step)
        return runs


def _available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def child(given: argparse.Namespace) -> None:
    """One group; the last line printed is its result."""
    torch.set_num_threads(1)
    started = time.process_time()
    side, dim, dtype = int(given.only[0].split("x")[0]), int(given.only[0].split("x")[1]), given.only[1]
    group = Group(side, dim, dtype, given.tokens, QUICK_SECONDS if given.quick else SECONDS, given.cpu_time)
    result = group.measure(given.part != "step", given.part != "forward")
    print(json.dumps({"machine": machine(started), **result}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for a busy machine")
    parser.add_argument("--only", nargs=2, metavar=("GRID", "TYPE"), help="one group, such as 512x1024 float32")
    parser.add_argument("--largest", type=float, default=20.0, help="GiB of the largest table that is measured")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 256, 2048])
    parser.add_argument("--part", choices=("both", "forward", "step"), default="both")
    parser.add_argument("--switch", choices=("off", "on", "both"), default="both", help="torch's huge pages")
    parser.add_argument("--again", action="store_true", help="what is stored already too")
    parser.add_argument("--name", default="peer_layer", help="of the file in benchmarks/results")
    parser.add_argument("--report", action="store_true", help="measure nothing, print the tables of what is stored")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    path = RESULTS / f"{given.name}.json"
    if given.child:
        child(given)
        return
    stored = json.loads(path.read_text()) if path.exists() else {"groups": {}}
    if given.report:
        print(report(stored["groups"]))
        return
    for switch in ("off", "on") if given.switch == "both" else (given.switch,):
        for dtype in TYPES if switch == "off" else TYPES[:1]:
            for side in SIDES:
                for dim in WIDTHS:
                    key = f"{side}x{dim} {dtype}, huge pages {switch}"
                    chosen = given.only is None or given.only == [f"{side}x{dim}", dtype]
                    small = 2 * side * side * dim * getattr(torch, dtype).itemsize <= given.largest * 2**30
                    if chosen and small and (given.again or key not in stored["groups"]):
                        stored["groups"][key] = measured(given, f"{side}x{dim}", dtype, switch)
                        stored["clock"] = "processor" if given.cpu_time else "wall"
                        stored["bars"] = verdict(stored["groups"])
                        path.parent.mkdir(exist_ok=True)
                        path.write_text(json.dumps(stored, separators=(",", ":")).replace('},"', '},\n"') + "\n")
                        print(report({key: stored["groups"][key]}), flush=True)
    print(report(stored["groups"]))


def measured(given: argparse.Namespace, size: str, dtype: str, switch: str) -> dict[str, Any]:
    """A group's result, from a process of its own."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.peer_layer", "--child", "--only", size, dtype, "--part", given.part]
    command += ["--tokens", *map(str, given.tokens)]
    command += ["--quick"] * given.quick + ["--cpu-time"] * given.cpu_time
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "THP_MEM_ALLOC_ENABLE": "1" if switch == "on" else "0"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"failed": f"exit code {done.returncode}"}
    result = json.loads(done.stdout.strip().splitlines()[-1])
    return {**result, "seconds": round(time.perf_counter() - started, 1)}


if __name__ == "__main__":
    main()
