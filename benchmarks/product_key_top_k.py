"""Product-key top-k of two rows of half-scores: compiled, plain torch, and two `torch.topk` with all k^2 sums.

    python -m benchmarks.product_key_top_k [--rounds 15] [--rows 1024]
    python -m benchmarks.product_key_top_k --report    # the table, from the stored result

A row is one token and head, so a token of eight heads takes eight times as long. The three alternate; scores are given,
in float32. The third is the way of Lample et al. and of PEER-pytorch. Processor time of one thread.
"""

import argparse
import json
import time
from typing import Any

import torch

from benchmarks.timing import RESULTS, alternate, machine, show, summary, write
from mixwright.ops import kernels
from mixwright.ops.best_sums import best_sums
from mixwright.ops.product_key import top_k_native

COMPILED, PLAIN, KNOWN = "compiled", "torch, staircase", "two topk, k^2 sums"


def known(first: torch.Tensor, second: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    (one, rows), (two, columns) = first.topk(k), second.topk(k)
    scores, order = (one[:, :, None] + two[:, None]).flatten(1).topk(k)
    return scores, (rows[:, :, None] * second.shape[1] + columns[:, None]).flatten(1).gather(1, order)


def measure(n: int, k: int, rows: int, rounds: int) -> dict[str, Any]:
    make = torch.Generator().manual_seed(n + k)
    first, second = torch.randn(rows, n, generator=make), torch.randn(rows, n, generator=make)
    compiled = top_k_native(first, second, k)
    assert compiled is not None, kernels.status()
    for scores, ids in (compiled, best_sums(first, second, k)):
        assert torch.equal(scores, known(first, second, k)[0]) and torch.equal(ids, compiled[1])
    runs = {
        COMPILED: lambda: top_k_native(first, second, k),
        PLAIN: lambda: best_sums(first, second, k),
        KNOWN: lambda: known(first, second, k),
    }
    times = summary(alternate(runs, rounds=rounds, cpu=True), KNOWN)
    show(f"n {n}, k {k}, {rows} rows", times)
    kept = {name: {key: round(row[key], 4) for key in ("runs", "median_ms", "least_ms")} for name, row in times.items()}
    return {"n": n, "k": k, "rows": rows, "times": kept}


def report(cases: list[dict[str, Any]]) -> str:
    """Microseconds of a row, medians, as a Markdown table."""
    lines = [f"| n | k | {KNOWN} | {PLAIN} | {COMPILED} | |", "| --- | --- | --- | --- | --- | --- |"]
    for case in cases:
        cells = [1e3 * case["times"][name]["median_ms"] / case["rows"] for name in (KNOWN, PLAIN, COMPILED)]
        numbers = " | ".join(f"{cell:.2f}" for cell in cells)
        lines.append(f"| {case['n']} | {case['k']} | {numbers} | {cells[0] / cells[2]:.1f}x |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--name", default="product_key_top_k", help="of the file in benchmarks/results")
    parser.add_argument("--report", action="store_true", help="measure nothing, print the table of what is stored")
    given = parser.parse_args()
    if given.report:
        print(report(json.loads((RESULTS / f"{given.name}.json").read_text())["cases"]))
        return
    torch.set_num_threads(1)
    started = time.process_time()
    cases = [measure(n, k, given.rows, given.rounds) for n in (128, 256, 512, 1024) for k in (16, 32)]
    print(report(cases))
    result = {"clock": "processor", "machine": machine(started), "cases": cases}
    print(f"written: {write(given.name, result)}")


if __name__ == "__main__":
    main()
