"""A pretrained GPT-NeoX and Mamba-2 as a hybrid, against what else the same tokens and FLOPs buy. No download.

python -m benchmarks.hybrid_pretrained --pretrain  # the pair, about 20 minutes of one core; goes on where it was cut
python -m benchmarks.hybrid_pretrained             # the comparison; resumes from --cache what was measured before
python -m benchmarks.hybrid_pretrained --report    # the tables of the method's README, from the cache or the JSON
python -m benchmarks.hybrid_pretrained --quick     # a walk through everything; its numbers say nothing

The pair is pretrained on WikiText-2 and lies in --out. Targets are Shakespeare and the standard library's own source;
see `hybrid_pretrained_texts`. Learning rates are chosen on a seed of their own, on the search part. The JSON has what
the cache has, however the run ends; with --minutes 0 nothing is measured.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.hybrid_pretrained_cells import Cells, quick_texts, run
from benchmarks.hybrid_pretrained_pair import present, pretrain
from benchmarks.hybrid_pretrained_systems import Budget, Workshop
from benchmarks.hybrid_pretrained_tables import tables
from benchmarks.hybrid_pretrained_texts import missing
from benchmarks.record import surroundings, write_json

RESULT = Path("benchmarks/results/hybrid_pretrained.json")
HOME = Path.home() / ".cache/mixwright"


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=HOME / "pretrained_pair", help="where the pair lies")
    parser.add_argument("--pretrain", action="store_true", help="train the pair and end")
    parser.add_argument("--cache", type=Path, default=HOME / "hybrid_pretrained.jsonl")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after so many")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--report", action="store_true", help="print the tables of what is in the cache")
    given = parser.parse_args()
    if given.report:
        found = Cells(given.cache).found or json.loads(RESULT.read_text("utf-8"))["cells"]
        print(tables(found))
        return
    if absent := missing(given.data):
        raise SystemExit(f"skipped: {given.data} lacks {', '.join(absent)}; name the folder with --data.")
    torch.set_num_threads(1)
    if given.pretrain:
        pretrain(given.out, given.data)
        return
    if not present(given.out):
        raise SystemExit(f"{given.out} holds no pair; train it with --pretrain.")
    started = time.process_time()
    budget = Budget(align=2, search=4, tune=4, retune=2) if given.quick else Budget()
    shop = Workshop(given.out, given.data, budget, {"align": 3e-3})
    if given.quick:
        quick_texts(shop)
        cells = Cells(None)
        run(cells, shop, 1)
        print(tables(cells.found))
        return
    given.cache.parent.mkdir(parents=True, exist_ok=True)
    cells = Cells(given.cache, time.time() + 60 * given.minutes)
    try:
        run(cells, shop, given.seeds)
    finally:
        result = {"budget": asdict(budget), "rates": shop.rates, "texts": shop.texts.sizes(), "cells": cells.found}
        where = {**surroundings(started), "command": "python -m benchmarks.hybrid_pretrained"}
        write_json(RESULT, {**where, **result})


if __name__ == "__main__":
    main()
