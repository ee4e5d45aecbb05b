"""What the cells of the MAD comparison say: means over seeds, each seed, and the two questions asked of them."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from benchmarks.hybrid_mad_models import ARMS, REFERENCE
from mixwright.evaluation.table import markdown

COMPONENTS = ("NeoX", "Mamba-2")
DEEPER = ("NeoX, twice as deep", "Mamba-2, twice as deep")
COLUMNS = {"steps": "equal steps", "flops": "equal FLOPs"}
Cell = Mapping[str, Any]


def summary(cells: Sequence[Cell], seeds: Sequence[int]) -> dict[str, Any]:
    """By column, task and arm: the rate that the first seed chose, and what came of it; and what is still missing."""
    found: dict[str, Any] = {}
    for column in COLUMNS:
        for task in dict.fromkeys(cell["task"] for cell in cells):
            rows = {
                arm: _row([c for c in cells if (c["task"], c["arm"]) == (task, arm) and column in c["columns"]], seeds)
                for arm in ARMS
            }
            rows = {arm: row for arm, row in rows.items() if row}
            found.setdefault(column, {})[task] = rows
    return found


def _row(cells: Sequence[Cell], seeds: Sequence[int]) -> dict[str, Any]:
    tuning = [cell for cell in cells if cell["seed"] == seeds[0]]
    if not tuning:
        return {}
    best = max(tuning, key=lambda cell: (cell["validation"]["accuracy"], -cell["validation"]["loss"]))
    own = {cell["seed"]: cell for cell in cells if cell["rate"] == best["rate"]}
    kept = [own[seed] for seed in seeds if seed in own]
    return {
        "rate": best["rate"],
        "tuning": {str(cell["rate"]): cell["validation"]["accuracy"] for cell in tuning},
        "steps": best["steps"],
        "parameters": best["parameters"],
        "seeds": [cell["seed"] for cell in kept],
        "accuracy": [cell["test"]["accuracy"] for cell in kept],
        "loss": [cell["test"]["loss"] for cell in kept],
        "cpu_seconds": [cell["cpu_seconds"] for cell in kept],
        "mixture_weights": [cell["mixture_weights"] for cell in kept],
    }


def report(found: Mapping[str, Any]) -> str:
    """Markdown: a table for each column, the answers, and where the search ended."""
    parts: list[str] = []
    for column, tasks in found.items():
        seeds = {str(len(row["seeds"])) for rows in tasks.values() for row in rows.values()}
        parts.append(
            f"#### Accuracy at {COLUMNS[column]} (mean of {' or '.join(sorted(seeds))} seeds, lowest .. highest)\n"
        )
        rows_of = [[arm, *(_shown(rows.get(arm)) for rows in tasks.values())] for arm in ARMS]
        parts.append(markdown(["arm", *tasks], [_named(tasks, row) for row in rows_of]))
        parts.append("\n" + "\n".join(_answers(column, tasks)) + "\n")
    parts.append("#### Mixture weights that the search found (Mamba-2's share in block 1 / block 2, each seed)\n")
    parts.append(_found_weights(found["steps"]))
    return "\n".join(parts)


def _named(tasks: Mapping[str, Any], row: list[str]) -> list[str]:
    arm, *rest = row
    steps = sorted({rows[arm]["steps"] for rows in tasks.values() if arm in rows})
    span = "" if not steps else f" ({steps[0]})" if len(steps) == 1 else f" ({steps[0]} to {steps[-1]})"
    return [f"**{arm}**{span}" if arm == REFERENCE else f"{arm}{span}", *rest]


def _shown(row: Mapping[str, Any] | None) -> str:
    if not row:
        return "-"
    each = row["accuracy"]
    return f"{mean(each):.3f}" + (f" ({min(each):.3f} .. {max(each):.3f})" if len(each) > 1 else "")


def _answers(column: str, tasks: Mapping[str, Any]) -> list[str]:
    """Of tasks that have all arms: how the searched hybrid stands to the better component and the better deep one."""
    whole = {task: rows for task, rows in tasks.items() if all(arm in rows for arm in ARMS)}
    lines: list[str] = []
    for question, others in (("better component", COMPONENTS), ("better twice-as-deep model", DEEPER)):
        gaps = {task: _gaps(rows, others) for task, rows in whole.items()}
        above = [task for task, gap in gaps.items() if mean(gap) >= 0]
        shown = "; ".join(
            f"{task} {mean(gap):+.3f} ({', '.join(f'{g:+.3f}' for g in gap)})" for task, gap in gaps.items()
        )
        lines.append(f"- {REFERENCE} is at or above the {question} on {len(above)} of {len(gaps)} tasks: {shown}.")
    return lines


def _gaps(rows: Mapping[str, Any], others: Sequence[str]) -> list[float]:
    """The hybrid's accuracy less that of the other that is better on the mean over seeds, seed by seed."""
    best = max(others, key=lambda arm: mean(rows[arm]["accuracy"]))
    mine, theirs = (dict(zip(rows[arm]["seeds"], rows[arm]["accuracy"])) for arm in (REFERENCE, best))
    return [mine[seed] - theirs[seed] for seed in mine if seed in theirs]


def _found_weights(tasks: Mapping[str, Any]) -> str:
    lines = [[arm, *(_weights(rows.get(arm)) for rows in tasks.values())] for arm in ("hybrid K=1", "hybrid K=2")]
    return markdown(["", *tasks], lines)


def _weights(row: Mapping[str, Any] | None) -> str:
    if not row:
        return "-"
    return ", ".join(" / ".join(f"{weights[1]:.2f}" for weights in seed) for seed in row["mixture_weights"])
