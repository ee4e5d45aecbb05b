"""One optimiser step over a table of neurons, by how many of its rows have a gradient; float32, two rows an expert.

    python -m benchmarks.row_optimizers [--quick] [--threads N] [--cpu-time]
    python -m benchmarks.row_optimizers --report    # the table, from the stored result

Everything alternates in one run, and each round draws other rows. A step is all that an optimiser costs: the gradient
cleared and filled for dense ones (`zero_`, then the touched rows written, as a dense backward pass must), and for lazy
ones the rows caught up before they are read. Weight decay is 0.1 where the optimiser has it (SparseAdam has none, and
is not Adam). `rows 1 %` touches one row of a hundred. Bars: up to half of the rows touched ours are never slower than
`torch.optim.AdamW(fused=True)`; at 1 % at least 10x faster.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import RESULTS, alternate, machine, show, summary, write
from mixwright.experts.table import NeuronTable
from mixwright.ops import kernels
from mixwright.training.row_optimizer import AbstractRowOptimizer
from mixwright.training.row_optimizers import LazyAdamW, RowwiseAdagrad

FUSED = "AdamW(fused=True)"
SIZES = ((128**2, 256), (512**2, 256))
SHARES = (0.0005, 0.01, 0.1, 0.4)


class Rows:
    """The rows of each round, the same for every contender."""

    def __init__(self, experts: int, width: int, share: float, rounds: int = 8) -> None:
        self.shape = torch.Size((experts, 2, width))
        count = max(1, round(experts * share))
        g = torch.Generator().manual_seed(0)
        self.ids = [torch.randperm(experts, generator=g)[:count].sort().values for _ in range(rounds)]
        self.values = torch.randn((count, 2, width), generator=g) * 1e-3

    def again(self) -> Iterator[Tensor]:
        while True:
            yield from self.ids


def table(rows: Rows) -> NeuronTable:
    torch.manual_seed(0)
    return NeuronTable(torch.randn(rows.shape).mul_(0.02))


def by_rows(make: Callable[..., AbstractRowOptimizer], rows: Rows, native: bool) -> Callable[[], object]:
    lazy, turn = table(rows), rows.again()
    optimizer = make(lazy, weight_decay=0.1)
    found = kernels.kernel

    def step() -> None:
        kernels.kernel = found if native else lambda: None
        try:
            ids = next(turn)
            for read in lazy.before_read:
                read(ids)
            lazy.rows.grad = torch.sparse_coo_tensor(
                ids[None], rows.values, rows.shape, is_coalesced=True, check_invariants=False
            )
            optimizer.step()
        finally:
            kernels.kernel = found

    return step


def dense(rows: Rows) -> Callable[[], object]:
    parameter, turn = nn.Parameter(table(rows).rows.detach()), rows.again()
    optimizer = torch.optim.AdamW([parameter], weight_decay=0.1, fused=True)
    parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        assert parameter.grad is not None
        parameter.grad.zero_().index_copy_(0, next(turn), rows.values)
        optimizer.step()

    return step


def sparse_adam(rows: Rows) -> Callable[[], object]:
    parameter, turn = nn.Parameter(table(rows).rows.detach()), rows.again()
    optimizer = torch.optim.SparseAdam([parameter])

    def step() -> None:
        parameter.grad = torch.sparse_coo_tensor(
            next(turn)[None], rows.values, rows.shape, is_coalesced=True, check_invariants=False
        )
        optimizer.step()

    return step


def measured(experts: int, width: int, share: float, rounds: int, cpu: bool) -> dict[str, dict[str, float]]:
    rows = Rows(experts, width, share)
    runs = {
        FUSED: dense(rows),
        "SparseAdam": sparse_adam(rows),
        "LazyAdamW": by_rows(LazyAdamW, rows, True),
        "LazyAdamW, torch": by_rows(LazyAdamW, rows, False),
        "RowwiseAdagrad": by_rows(RowwiseAdagrad, rows, True),
        "RowwiseAdagrad, torch": by_rows(RowwiseAdagrad, rows, False),
    }
    return summary(alternate(runs, rounds=rounds, cpu=cpu), FUSED)


def report() -> None:
    stored: dict[str, Any] = json.loads((RESULTS / "row_optimizers.json").read_text())
    names = list(next(iter(stored["cells"].values())))
    print("| experts x width, rows touched | " + " | ".join(names) + " |")
    print("|---|" + "---|" * len(names))
    for cell, found in stored["cells"].items():
        base = found[FUSED]["median_ms"]
        numbers = [f"{found[n]['median_ms']:.2f} ({base / found[n]['median_ms']:.1f}x)" for n in names]
        print(f"| {cell} | " + " | ".join(numbers) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the small table, fewer rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="count this process's processor time")
    parser.add_argument("--report", action="store_true", help="measure nothing, print the table of what is stored")
    given = parser.parse_args()
    if given.report:
        report()
        return
    torch.set_num_threads(given.threads)
    started, cells = time.process_time(), dict[str, Any]()
    for experts, width in SIZES[:1] if given.quick else SIZES:
        for share in SHARES:
            cell = f"{experts} x {width}, {100 * share:g} %"
            cells[cell] = measured(experts, width, share, 6 if given.quick else 20, given.cpu_time)
            show(cell, cells[cell])
    if not given.quick:
        clock = "processor" if given.cpu_time else "wall"
        print(write("row_optimizers", {"clock": clock, "cells": cells, **machine(started)}))


if __name__ == "__main__":
    main()
