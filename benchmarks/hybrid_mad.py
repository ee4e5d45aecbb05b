"""Hybrids of NeoX and Mamba-2 from scratch on five tasks of MAD, at equal steps and at equal FLOPs.

    python -m benchmarks.hybrid_mad --cache build/benchmarks/hybrid_mad.jsonl            # goes on where it stopped
    python -m benchmarks.hybrid_mad --cache build/benchmarks/hybrid_mad.jsonl --report   # tables of what is there
    python -m benchmarks.hybrid_mad --cache build/benchmarks/hybrid_mad.jsonl --write    # the same as JSON

A cell is a task, a seed, an arm and a learning rate. A seed that is not reported looks for every arm's rate, for each
task and column by itself, by accuracy on validation examples: 2e-3, 5e-3, and 1e-3 where 5e-3 was no better than 2e-3.
The seeds that are reported have that rate. Equal FLOPs are those of the searched hybrid of two blocks: what costs less
per step gets more steps, of the same stream of examples, with a schedule of that length. Everything shown is on test
examples.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.hybrid_mad_models import (
    ARMS,
    REFERENCE,
    WEIGHTS_RATE,
    Size,
    make,
    operations,
    parameters,
    scores,
    trained,
)
from benchmarks.hybrid_mad_tables import COLUMNS, report, summary
from benchmarks.record import surroundings, write_json
from mixwright.data.mad import SMALL
from mixwright.data.mad_tasks import MadTask

RATES = (2e-3, 5e-3, 1e-3)
TASKS = SMALL
TUNING = 0
Cell = dict[str, Any]


class Cells:
    """What was measured, a line of JSON each; `settings` are part of every key.

    The file is read anew every time, so that several processes may work on it, each on other tasks or in another order.
    """

    def __init__(self, path: Path, settings: str) -> None:
        self.path, self.settings = path, settings

    @property
    def known(self) -> list[Cell]:
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        return [cell for cell in whole if cell["settings"] == self.settings]

    def find(self, **key: Any) -> list[Cell]:
        return [cell for cell in self.known if all(cell[name] == value for name, value in key.items())]

    def add(self, cell: Cell) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({**cell, "settings": self.settings}) + "\n")


def horizons(arm: str, size: Size, task: MadTask) -> dict[str, int]:
    """Steps of an arm in each column; FLOPs that differ by less than a tenth count as equal."""
    tokens, targets = (lambda e: (e.tokens, e.targets))(task.sample(size.batch, 0))
    each = {name: operations(make(name, size, task, 0), tokens, targets) for name in (arm, REFERENCE)}
    share = each[REFERENCE] / each[arm]
    return {"steps": size.steps, "flops": size.steps if abs(share - 1) < 0.1 else round(size.steps * share)}


def best_rate(cells: Cells, task: str, arm: str, seed: int, steps: int) -> float:
    """By accuracy on validation examples; of equal ones the lower loss."""
    found = cells.find(task=task, arm=arm, seed=seed, steps=steps)
    return max(found, key=lambda cell: (cell["validation"]["accuracy"], -cell["validation"]["loss"]))["rate"]


def measure(
    cells: Cells,
    task: MadTask,
    seed: int,
    arm: str,
    size: Size,
    rate: float,
    steps: Mapping[str, int],
    device: str,
    columns: Sequence[str] = tuple(COLUMNS),
) -> None:
    """Train an arm for each number of steps of these columns that the cache lacks."""
    asked = {n for name, n in steps.items() if name in columns}
    wanted = sorted(n for n in asked if not cells.find(task=task.name, seed=seed, arm=arm, rate=rate, steps=n))
    if not wanted:
        return
    began = time.process_time()
    model = make(arm, size, task, seed).to(device)
    count = parameters(model)
    examples = task.sample(wanted[-1] * size.batch, seed).to(device)
    held_out = [task.sample(size.validation, seed, "validation"), task.sample(size.test, seed, "test")]
    held_out = [each.to(device) for each in held_out]
    for reached in trained(model, examples, size, rate, wanted):
        validation, test = (scores(model, each) for each in held_out)
        weights = getattr(model, "mixture_weights", None)
        cell = {
            "task": task.name, "seed": seed, "arm": arm, "rate": rate, "steps": reached,
            "columns": [name for name, n in steps.items() if n == reached], "parameters": count,
            "validation": validation, "test": test, "cpu_seconds": round(time.process_time() - began, 1),
            "mixture_weights": None if weights is None else weights.tolist(),
        }  # fmt: skip
        cells.add(cell)
        print(json.dumps({k: v for k, v in cell.items() if k != "columns"}), file=sys.stderr, flush=True)


def run(
    cells: Cells,
    size: Size,
    tasks: Sequence[str],
    seeds: Sequence[int],
    device: str,
    *,
    tuning: int = TUNING,
    arms: Sequence[str] = ARMS,
    columns: Sequence[str] = tuple(COLUMNS),
) -> None:
    """All arms of a task and a seed together; seeds one after another, that which chooses rates first."""
    for seed, task in ((seed, TASKS[name]) for seed in (tuning, *seeds) for name in tasks):
        for arm in arms:
            steps = horizons(arm, size, task)
            for rate, asked in _rates(cells, task, arm, seed, tuning, steps):
                measure(cells, task, seed, arm, size, rate, asked, device, columns)


def _rates(
    cells: Cells, task: MadTask, arm: str, seed: int, first: int, steps: dict[str, int]
) -> Iterator[tuple[float, dict[str, int]]]:
    """What to train, rate by rate, with the columns that it is for."""
    if seed == first:
        for rate in RATES[:2]:
            yield rate, steps
        short = {n: s for n, s in steps.items() if best_rate(cells, task.name, arm, first, s) == RATES[0]}
        if short:
            yield RATES[2], short
        return
    chosen = {name: best_rate(cells, task.name, arm, first, s) for name, s in steps.items()}
    for rate in sorted(set(chosen.values())):
        yield rate, {name: s for name, s in steps.items() if chosen[name] == rate}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the cache lacks, or show what it has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("build/benchmarks/hybrid_mad.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/hybrid_mad.json"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="those that are reported")
    parser.add_argument("--tuning-seed", type=int, default=TUNING, help="that which chooses learning rates")
    parser.add_argument("--columns", nargs="+", choices=list(COLUMNS), default=list(COLUMNS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="a walk through everything; its numbers say nothing")
    parser.add_argument(
        "--report", action="store_true", help="print the tables of what is measured, and measure nothing"
    )
    parser.add_argument("--write", action="store_true", help="write them as JSON, and measure nothing")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    started = time.process_time()
    size = Size(steps=40, validation=64, test=64) if args.quick else Size()
    settings = json.dumps([asdict(size), [str(task) for task in TASKS.values()], WEIGHTS_RATE])
    cells = Cells(args.cache, settings)
    if not args.report and not args.write:
        run(
            cells, size, args.tasks, args.seeds, args.device,
            tuning=args.tuning_seed, arms=args.arms, columns=args.columns,
        )  # fmt: skip
        return
    known = sorted(cells.known, key=lambda cell: list(TASKS).index(cell["task"]))
    found = summary(known, args.seeds, args.tuning_seed)
    if args.write:
        spent = round(sum(_spent(known)), 1)
        write_json(
            args.out,
            {"results": found, "settings": json.loads(settings), **surroundings(started), "cpu_seconds": spent},
        )
    print(report(found))


def _spent(cells: Sequence[Cell]) -> Iterator[float]:
    """CPU time of each run: of its branches that of the last."""
    runs: dict[tuple[Any, ...], float] = {}
    for cell in cells:
        key = tuple(cell[name] for name in ("task", "seed", "arm", "rate"))
        runs[key] = max(runs.get(key, 0.0), cell["cpu_seconds"])
    yield from runs.values()


if __name__ == "__main__":
    main()
