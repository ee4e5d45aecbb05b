"""PEER's Triton kernels on a GPU against the bandwidth of a copy measured in the same run.

    python -m benchmarks.peer_gpu [--tokens 4096] [--width 1024] [--grid 1024] [--rounds 30]
    python -m benchmarks.peer_gpu --report    # the table, from the stored result

The expert phase counts only the bytes of the rows that must be read: of the distinct experts of the batch, every part
once, and for the gradients of the rows what is written. The copy reads and writes 2 GiB; both its directions count.
Bar: the forward expert phase at 60 % of the copy's bandwidth or more (N = 1024^2, d 1024, 4096 tokens, bfloat16, 8
heads of 16). Outputs are checked against the plain path on some tokens first. Without a GPU it says so and stops.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import RESULTS, machine, write
from mixwright.ops.neuron import combine_neurons, neurons_reference
from mixwright.ops.route import route

HEADS, K, BAR = 8, 16, 0.6


def seconds(run: Callable[[], object], rounds: int) -> list[float]:
    """By the device's own clock, after warming up."""
    for _ in range(3):
        run()
    taken: list[float] = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3)
    return taken


def copy_bandwidth(rounds: int) -> float:
    """Bytes per second, read and written."""
    source = torch.empty(1 << 30, dtype=torch.bfloat16, device="cuda")
    to = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(seconds(lambda: to.copy_(source), rounds))


def measure(tokens: int, width: int, side: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    device, dtype, half = "cuda", torch.bfloat16, 128
    x = torch.randn(tokens, width, device=device, dtype=dtype)
    rows = torch.randn(side * side, 2, width, device=device, dtype=dtype) * width**-0.5
    queries = torch.randn(tokens, HEADS, 2, half, device=device)
    first, second = torch.randn(2, 1, side, half, device=device) * half**-0.5
    found = route(queries, first, second, K)
    weights, indices = found.scores.softmax(-1).flatten(1), found.indices.flatten(1)
    mine = combine_neurons(x[:64], rows, weights[:64], indices[:64], "gelu").float()
    plain = neurons_reference(x[:64].float(), rows[indices[:64].unique()].float(), weights[:64],
                              torch.searchsorted(indices[:64].unique(), indices[:64]), "gelu")  # fmt: skip
    torch.testing.assert_close(mine, plain, rtol=3e-2, atol=3e-2 * float(plain.abs().max()))
    read = len(indices.unique()) * rows[0].nbytes
    bandwidth = copy_bandwidth(rounds)
    given = [t.detach().requires_grad_() for t in (x, rows, weights)]
    seed = torch.randn_like(x)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(combine_neurons(*given, indices, "gelu", gradient="compact"), given, seed)

    forward = seconds(lambda: combine_neurons(x, rows, weights, indices, "gelu"), rounds)
    taken = {
        "route": seconds(lambda: route(queries, first, second, K), rounds),
        "experts, forward": forward,
        "experts, forward and backward with compact gradients": seconds(step, rounds),
    }
    share = read / statistics.median(forward) / bandwidth
    return {
        "tokens": tokens, "width": width, "experts": side * side, "dtype": "bfloat16", "heads": HEADS, "k": K,
        "copy_bytes_per_second": bandwidth, "bytes_of_rows": read,
        "ms": {name: {"median": 1e3 * statistics.median(t), "least": 1e3 * min(t)} for name, t in taken.items()},
        "bar": {"share_of_copy_bandwidth": share, "at_least": BAR, "met": share >= BAR},
    }  # fmt: skip


def report(case: dict[str, Any]) -> str:
    lines = ["| | median, ms | quickest, ms |", "| --- | --- | --- |"]
    lines += [f"| {name} | {row['median']:.3f} | {row['least']:.3f} |" for name, row in case["ms"].items()]
    lines.append(
        f"\nThe forward expert phase reaches {case['bar']['share_of_copy_bandwidth']:.0%} of the copy's bandwidth."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--grid", type=int, default=1024, help="sub-keys on each axis")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--name", default="peer_gpu", help="of the file in benchmarks/results")
    parser.add_argument("--report", action="store_true", help="measure nothing, print the table of what is stored")
    given = parser.parse_args()
    if given.report:
        print(report(json.loads((RESULTS / f"{given.name}.json").read_text())["case"]))
        return
    if not torch.cuda.is_available():
        sys.exit("no GPU is here: nothing was measured")
    started = time.process_time()
    case = measure(given.tokens, given.width, given.grid, given.rounds)
    print(report(case))
    device = torch.cuda.get_device_name()
    print(f"written: {write(given.name, {'device': device, 'machine': machine(started), 'case': case})}")


if __name__ == "__main__":
    main()
