"""What each path of the dispatch costs, beside what `ops/cost.py` predicts, and what its choice loses by being wrong.

    python -m benchmarks.dispatch_paths [--quick]

Measures `add_each`, `add_grouped` and, where it is built, the compiled path, for shapes from 64 to 2048 wide, and fits
the constants of `Costs` anew by least squares on relative errors, so that they can be compared with those in use.
"""

import argparse
import time
from itertools import product
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.timing import alternate, machine, write
from mixwright.ops import kernels
from mixwright.ops.accumulate import add_each, add_grouped
from mixwright.ops.cost import MEASURED, expected_chosen, microseconds_each, microseconds_grouped

RANK, TOP_K = 16, 2


@torch.inference_mode()
def measure(width: int, experts: int, tokens: int, *, rounds: int, cpu: bool) -> dict[str, Any]:
    """Median microseconds of every path for one shape."""
    make = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=make)
    down = torch.randn(experts, RANK, width, generator=make)
    up = torch.randn(experts, width, RANK, generator=make)
    values, indices = torch.randn(tokens, experts, generator=make).topk(TOP_K, -1)
    arguments = (torch.zeros(tokens, width), x, down, up, torch.ones(experts), values.softmax(-1), indices)
    runs: dict[str, Any] = {"each": lambda: add_each(*arguments), "grouped": lambda: add_grouped(*arguments)}
    native = kernels.kernel()
    if native is not None:
        runs["compiled"] = lambda: kernels.add_native(native, *arguments)
    # Something larger than a cache between two runs: in a model, other layers' weights pass between two calls.
    other = torch.empty(12_000_000)
    runs["(cache emptied)"] = lambda: other.add_(1.0)
    seconds = alternate(runs, rounds=rounds, cpu=cpu)
    median = {name: 1e6 * sorted(values)[len(values) // 2] for name, values in seconds.items() if name[0] != "("}
    shape = {"rank": RANK, "width": 2 * width}
    predicted = {
        "each": microseconds_each(tokens, TOP_K, **shape),
        "grouped": microseconds_grouped(tokens, TOP_K, experts=experts, **shape),
    }
    return {"width": width, "experts": experts, "tokens": tokens, "measured": median, "predicted": predicted}


def fitted(cases: list[dict[str, Any]]) -> dict[str, float]:
    """The constants of `Costs` that fit these cases best, as relative errors."""
    rows: list[list[float]] = []
    for case in cases:
        assignments = case["tokens"] * TOP_K
        chosen = expected_chosen(assignments, case["experts"])
        megabytes = 4 * RANK * 2 * case["width"] / 2**20
        for path, features in (
            ("each", [1, assignments, 0, 0, 0, assignments * megabytes]),
            ("grouped", [0, 0, 1, chosen, assignments, chosen * megabytes]),
        ):
            rows.append([value / case["measured"][path] for value in features])
    solution = torch.linalg.lstsq(
        torch.tensor(rows, dtype=torch.float64), torch.ones(len(rows), 1, dtype=torch.float64)
    )
    names = ("each_once", "assignment_each", "grouped_once", "expert_grouped", "assignment_grouped", "megabyte")
    return {name: round(value, 2) for name, value in zip(names, solution.solution[:, 0].tolist(), strict=True)}


def show(cases: list[dict[str, Any]]) -> dict[str, float]:
    """One row for each shape; returns how often the choice is wrong and the most it loses."""
    table = Table(title="microseconds, measured (predicted)", title_justify="left")
    for heading in ("width", "experts", "tokens", "each", "grouped", "compiled", "chosen", "loss"):
        table.add_column(heading, justify="right")
    losses: list[float] = []
    for case in cases:
        measured, predicted = case["measured"], case["predicted"]
        chosen = min(predicted, key=lambda path: predicted[path])
        losses.append(measured[chosen] / min(measured["each"], measured["grouped"]) - 1)
        cells = [f"{measured[path]:.0f} ({predicted[path]:.0f})" for path in ("each", "grouped")]
        compiled = f"{measured['compiled']:.0f}" if "compiled" in measured else "not built"
        sizes = (str(case[name]) for name in ("width", "experts", "tokens"))
        table.add_row(*sizes, *cells, compiled, chosen, f"{losses[-1]:.0%}")
    Console(width=120).print(table)
    wrong = sum(loss > 0 for loss in losses) / len(losses)
    return {"wrong": wrong, "mean_loss": sum(losses) / len(losses), "largest_loss": max(losses)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="processor time; with one thread, for a busy machine")
    parser.add_argument("--name", default="dispatch_paths", help="of the file in benchmarks/results")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    started = time.process_time()
    widths, pools = ((512, 2048), (8, 166)) if given.quick else ((64, 512, 2048), (8, 36, 166))
    counts = (1, 4, 16, 64) if given.quick else (1, 4, 16, 64, 512)
    rounds = 9 if given.quick else 25
    cases = [measure(*shape, rounds=rounds, cpu=given.cpu_time) for shape in product(widths, pools, counts)]
    choice, fit = show(cases), fitted(cases)
    print("choice:", {name: round(value, 3) for name, value in choice.items()})
    print("in use:", MEASURED)
    print("fitted:", fit)
    clock = "processor" if given.cpu_time else "wall"
    content = {"clock": clock, "machine": machine(started), "choice": choice, "fitted": fit, "cases": cases}
    print(f"written: {write(given.name, content)}")


if __name__ == "__main__":
    main()
