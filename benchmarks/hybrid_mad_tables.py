"""What the cells of the MAD comparison say: means over seeds, each seed, and the two questions asked of them.

Few seeds allow few claims. A difference has a 95 % interval over seeds (Student's t, paired by seed), and where that
includes 0 the verdict is that there is no significant difference.
"""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from benchmarks.hybrid_mad_models import ARMS, REFERENCE
from mixwright.evaluation.table import markdown

COMPONENTS = ("NeoX", "Mamba-2")
DEEPER = ("NeoX, twice as deep", "Mamba-2, twice as deep")
BY_HAND = "SSM then attention"
COLUMNS = {"steps": "equal steps", "flops": "equal FLOPs"}
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}  # 97.5 %
Cell = Mapping[str, Any]


def summary(cells: Sequence[Cell], seeds: Sequence[int], tuning: int) -> dict[str, Any]:
    """By column, task and arm: the rate that the seed `tuning` chose, and what came of it on the others."""
    found: dict[str, Any] = {}
    for column in COLUMNS:
        for task in dict.fromkeys(cell["task"] for cell in cells):
            mine = [cell for cell in cells if cell["task"] == task and column in cell["columns"]]
            rows = {arm: _row([cell for cell in mine if cell["arm"] == arm], seeds, tuning) for arm in ARMS}
            rows = {arm: row for arm, row in rows.items() if row}
            found.setdefault(column, {})[task] = rows
    return found


def _row(cells: Sequence[Cell], seeds: Sequence[int], tuning: int) -> dict[str, Any]:
    tried = [cell for cell in cells if cell["seed"] == tuning]
    if not tried:
        return {}
    best = max(tried, key=lambda cell: (cell["validation"]["accuracy"], -cell["validation"]["loss"]))
    own = {cell["seed"]: cell for cell in cells if cell["rate"] == best["rate"]}
    kept = [own[seed] for seed in seeds if seed in own]
    if not kept:
        return {}
    return {
        "rate": best["rate"],
        "tuning": {str(cell["rate"]): cell["validation"]["accuracy"] for cell in tried},
        "steps": best["steps"],
        "parameters": best["parameters"],
        "seeds": [cell["seed"] for cell in kept],
        "accuracy": [cell["test"]["accuracy"] for cell in kept],
        "loss": [cell["test"]["loss"] for cell in kept],
        "cpu_seconds": [cell["cpu_seconds"] for cell in kept],
        "mixture_weights": [cell["mixture_weights"] for cell in kept],
    }


def report(found: Mapping[str, Any]) -> str:
    """Markdown: a table for each column, the answers, learning rates, and where the search ended."""
    parts: list[str] = []
    for column, tasks in found.items():
        most = max((len(row["seeds"]) for rows in tasks.values() for row in rows.values()), default=0)
        parts.append(
            f"#### Accuracy at {COLUMNS[column]} (mean, lowest .. highest; {most} seeds where no number says less)\n"
        )
        rows_of = [[arm, *(_shown(rows.get(arm), most) for rows in tasks.values())] for arm in ARMS]
        parts.append(markdown(["arm", *tasks], [_named(tasks, row) for row in rows_of]))
        parts.append("\n" + "\n".join(_answers(tasks)) + "\n")
    parts.append("#### Learning rates that the tuning seed chose (equal steps / equal FLOPs)\n")
    parts.append(_rates(found) + "\n")
    parts.append("#### Mixture weights that the search found (Mamba-2's share in block 1 / block 2, each seed)\n")
    parts.append(_found_weights(found["steps"]))
    return "\n".join(parts)


def _named(tasks: Mapping[str, Any], row: list[str]) -> list[str]:
    arm, *rest = row
    steps = sorted({rows[arm]["steps"] for rows in tasks.values() if arm in rows})
    span = "" if not steps else f" ({steps[0]})" if len(steps) == 1 else f" ({steps[0]} to {steps[-1]})"
    return [f"**{arm}**{span}" if arm == REFERENCE else f"{arm}{span}", *rest]


def _shown(row: Mapping[str, Any] | None, most: int) -> str:
    if not row:
        return "-"
    each = row["accuracy"]
    spread = [f"{min(each):.3f} .. {max(each):.3f}"] if len(each) > 1 else []
    fewer = [f"{len(each)} of {most}"] if len(each) < most else []
    return f"{mean(each):.3f}" + (f" ({'; '.join([*spread, *fewer])})" if spread or fewer else "")


def _answers(tasks: Mapping[str, Any]) -> list[str]:
    """Of tasks that have all arms: how two hybrids stand to the better component and the better deep one."""
    whole = {task: rows for task, rows in tasks.items() if all(arm in rows for arm in ARMS)}
    lines: list[str] = []
    for system in (REFERENCE, BY_HAND):
        for question, others in (("better component", COMPONENTS), ("better twice-as-deep model", DEEPER)):
            gaps = {task: _gaps(rows, system, others) for task, rows in whole.items()}
            above = [task for task, (_, gap) in gaps.items() if gap and mean(gap) >= 0]
            lines.append(f"- {system} is at or above the {question} on {len(above)} of {len(gaps)} tasks.")
            for task, (rival, gap) in gaps.items():
                each = ", ".join(f"{g:+.3f}" for g in gap)
                lines.append(f"  - {task}, {rival}: {_interval(gap)}, {verdict(gap)} ({each})")
    return lines


def _interval(gaps: Sequence[float]) -> str:
    half = _half(gaps)
    return f"{mean(gaps):+.3f}" + (
        "" if half is None else f" (95 % {mean(gaps) - half:+.3f} .. {mean(gaps) + half:+.3f})"
    )


def _half(gaps: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of the mean; None for one seed, of which nothing can be said."""
    return STUDENT[len(gaps) - 1] * stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else None


def verdict(gaps: Sequence[float]) -> str:
    """What the differences of the seeds allow one to say."""
    half = _half(gaps)
    if half is None or abs(mean(gaps)) <= half:
        return "no significant difference"
    return "better" if mean(gaps) > 0 else "worse"


def _gaps(rows: Mapping[str, Any], system: str, others: Sequence[str]) -> tuple[str, list[float]]:
    """The other that is better on the mean over seeds, and a system's accuracy less that one's, seed by seed."""
    best = max(others, key=lambda arm: mean(rows[arm]["accuracy"]))
    mine, theirs = (dict(zip(rows[arm]["seeds"], rows[arm]["accuracy"])) for arm in (system, best))
    return best, [mine[seed] - theirs[seed] for seed in mine if seed in theirs]


def _rates(found: Mapping[str, Any]) -> str:
    steps, flops = found["steps"], found.get("flops", {})

    def shown(task: str, arm: str) -> str:
        rows = [column[task][arm] for column in (steps, flops) if arm in column.get(task, {})]
        return " / ".join(f"{row['rate']:g}" for row in rows) or "-"

    return markdown(["", *steps], [[arm, *(shown(task, arm) for task in steps)] for arm in ARMS])


def _found_weights(tasks: Mapping[str, Any]) -> str:
    lines = [[arm, *(_weights(rows.get(arm)) for rows in tasks.values())] for arm in ("hybrid K=1", "hybrid K=2")]
    return markdown(["", *tasks], lines)


def _weights(row: Mapping[str, Any] | None) -> str:
    if not row:
        return "-"
    return ", ".join(" / ".join(f"{weights[1]:.2f}" for weights in seed) for seed in row["mixture_weights"])
