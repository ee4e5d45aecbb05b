"""Means, intervals and tables of the transfer suite, from its JSON.

python -m benchmarks.transfer_tables
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from mixwright.evaluation.intervals import Interval, bootstrap_mean, paired_difference
from mixwright.evaluation.table import markdown

SHARED, PRIVATE = "LoRA, shared", "LoRA, private"
LIKE_A_SOURCE = "sst2"
"""Comes from where the held-in mr comes from, so means are told without it too."""


def summaries(result: dict[str, Any]) -> dict[str, Any]:
    """By size: few-shot transfer by shots and system, and the held-in tasks by method."""
    found: dict[str, Any] = {}
    for size, systems in result["few_shot"].items():
        units = common_units(systems)
        if not units:
            continue
        shots = list(next(iter(systems.values())))
        found[size] = {
            "units": units,
            "few_shot": {n: few_shot(systems, n, units) for n in shots},
            "held_in": held_in(result["held_in"][size]),
        }
    return found


def common_units(systems: dict[str, Any]) -> list[str]:
    """The `seed.draw` that every system has finished."""
    sets = [set(accuracies) for by_shots in systems.values() for accuracies in by_shots.values()]
    return sorted(set.intersection(*sets)) if sets else []


def few_shot(systems: dict[str, Any], shots: str, units: list[str]) -> dict[str, Any]:
    """Every system's mean, and its paired differences to the two LoRAs, over seeds x draws x tasks."""
    values = {name: {u: by_shots[shots][u] for u in units} for name, by_shots in systems.items()}
    tasks = list(next(iter(next(iter(values.values())).values())))
    others = [task for task in tasks if task != LIKE_A_SOURCE]
    private = _by_task(values[f"{PRIVATE} | all"], tasks)
    rows: dict[str, Any] = {}
    for name, found in values.items():
        by_task = _by_task(found, tasks)
        rows[name] = {
            "mean": _numbers(bootstrap_mean(_flat(found, tasks))),
            "without_sst2": _numbers(bootstrap_mean(_flat(found, others))),
            "by_task": by_task,
            "by_seed": _by_seed(found, tasks),
            "below_private": sum(by_task[task] < private[task] for task in tasks),
        }
        own = name.split(" | ")[0]
        for reference, base in ((r, values.get(f"{r} | all")) for r in (SHARED, PRIVATE, own)):
            if base is not None:
                both = {"": tasks, " without_sst2": others}
                for suffix, chosen in both.items():
                    gap = paired_difference(_flat(found, chosen), _flat(base, chosen))
                    rows[name][f"minus {reference}{suffix}"] = _numbers(gap)
    return rows


def held_in(methods: dict[str, Any]) -> dict[str, Any]:
    """Every method's accuracy on the tasks it was trained on, and how many of them are below their private LoRA."""
    seeds = sorted(set.intersection(*(set(found) for found in methods.values())))
    tasks = list(methods[PRIVATE][seeds[0]])
    private = {seed: methods[PRIVATE][seed] for seed in seeds}
    rows: dict[str, Any] = {}
    for name, by_seed in methods.items():
        found = {seed: by_seed[seed] for seed in seeds}
        by_task, theirs = _by_task(found, tasks), _by_task(private, tasks)
        rows[name] = {
            "mean": _numbers(bootstrap_mean(_flat(found, tasks))),
            f"minus {PRIVATE}": _numbers(paired_difference(_flat(found, tasks), _flat(private, tasks))),
            "by_seed": _by_seed(found, tasks),
            "by_task": by_task,
            "below_private": sum(by_task[task] < theirs[task] for task in tasks),
            "below_private_by_seed": [sum(found[s][task] < private[s][task] for task in tasks) for s in seeds],
        }
    return rows


def _flat(found: dict[str, dict[str, float]], tasks: list[str]) -> torch.Tensor:
    return torch.tensor([accuracies[task] for accuracies in found.values() for task in tasks], dtype=torch.float64)


def _by_task(found: dict[str, dict[str, float]], tasks: list[str]) -> dict[str, float]:
    return {task: sum(accuracies[task] for accuracies in found.values()) / len(found) for task in tasks}


def _by_seed(found: dict[str, dict[str, float]], tasks: list[str]) -> list[float]:
    seeds: dict[str, list[float]] = {}
    for unit, accuracies in found.items():
        seeds.setdefault(unit.split(".")[0], []).append(sum(accuracies[task] for task in tasks) / len(tasks))
    return [sum(means) / len(means) for means in seeds.values()]


def _numbers(found: Interval) -> list[float]:
    return [found.value, found.low, found.high]


def tables(result: dict[str, Any]) -> str:
    """All tables as markdown."""
    parts: list[str] = []
    for size, summary in result["summary"].items():
        seeds = len({unit.split(".")[0] for unit in summary["units"]})
        title = f"{size}: new tasks ({len(summary['units'])} draws of shots over {seeds} seeds)"
        parts.append(f"#### {title}\n\n{few_shot_table(result, size, summary['few_shot'])}")
        parts.append(f"#### {size}: within a method\n\n{ways_table(summary['few_shot'])}")
        parts.append(f"#### {size}: held-in tasks\n\n{held_in_table(result, size, summary['held_in'])}")
    return "\n\n".join(parts)


def few_shot_table(result: dict[str, Any], size: str, by_shots: dict[str, Any]) -> str:
    """Best mean over both numbers of shots first; the last row is the backbone before any shot."""
    names = list(next(iter(by_shots.values())))
    tasks = list(next(iter(by_shots.values()))[names[0]]["by_task"])
    lines: list[list[str]] = []
    for name in sorted(names, key=lambda n: sum(rows[n]["mean"][0] for rows in by_shots.values()), reverse=True):
        method, what = name.split(" | ")
        line = [method, what, f"{result['trained'][size][method][what]:,}"]
        for rows in by_shots.values():
            row = rows[name]
            line += [
                f"{row['mean'][0]:.3f} ({row['mean'][1]:.3f} .. {row['mean'][2]:.3f})",
                f"{row['without_sst2'][0]:.3f}",
                _gap(row, f"minus {SHARED}"),
                _gap(row, f"minus {PRIVATE}"),
                "" if name == f"{PRIVATE} | all" else str(row["below_private"]),
            ]
        lines.append(line)
    plain = result["backbone"]
    mean, without = (sum(plain[t] for t in chosen) / len(chosen) for chosen in (tasks, tasks[1:]))
    lines.append(["backbone, no shot", "", "0", *[f"{mean:.3f}", f"{without:.3f}", "", "", ""] * len(by_shots)])
    head = ["method", "learns", "numbers that learn"]
    for shots in by_shots:
        head += [f"{shots} shots: mean (95 %)", "without sst2", "minus shared LoRA", "minus private LoRA"]
        head += [f"of {len(tasks)} tasks below private"]
    return markdown(head, lines)


def ways_table(by_shots: dict[str, Any]) -> str:
    """What learning the row alone (z), or the experts under uniform routing (mu), gains over learning all."""
    lines: list[list[str]] = []
    for name in next(iter(by_shots.values())):
        method, what = name.split(" | ")
        if what != "all":
            lines.append(
                [method, f"{what} minus all", *(_gap(rows[name], f"minus {method}") for rows in by_shots.values())]
            )
    return markdown(["method", "", *(f"{shots} shots" for shots in by_shots)], lines)


def _gap(row: dict[str, Any], name: str) -> str:
    if name not in row:
        return ""
    value, low, high = row[name]
    return "reference" if value == low == high == 0 else f"{value:+.3f} ({low:+.3f} .. {high:+.3f})"


def held_in_table(result: dict[str, Any], size: str, rows: dict[str, Any]) -> str:
    """Best mean first."""
    lines: list[list[str]] = []
    for name in sorted(rows, key=lambda n: rows[n]["mean"][0], reverse=True):
        row = rows[name]
        below = f"{row['below_private']} ({' '.join(map(str, row['below_private_by_seed']))})"
        zero = [sum(found.values()) / len(found) for found in result["zero_shot"][size][name].values() if found]
        lines.append(
            [
                name,
                f"{result['stored'][size][name]:,}",
                f"{row['mean'][0]:.3f}",
                _gap(row, f"minus {PRIVATE}"),
                "" if name == PRIVATE else below,
                *(f"{value:.3f}" for value in row["by_task"].values()),
                f"{sum(zero) / len(zero):.3f}" if zero else "",
            ]
        )
    tasks = list(rows[PRIVATE]["by_task"])
    plain = result["backbone"]
    lines.append(["backbone", "0", f"{sum(plain[t] for t in tasks) / len(tasks):.3f}", "", ""])
    new = [task for task in plain if task not in tasks]
    lines[-1] += [*(f"{plain[task]:.3f}" for task in tasks), f"{sum(plain[t] for t in new) / len(new):.3f}"]
    head = ["method", "stored", "mean", "minus private LoRA", "tasks below private, of 9 (each seed)"]
    return markdown([*head, *tasks, "new tasks, no shot"], lines)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=Path("benchmarks/results/transfer_suite.json"))
    result = json.loads(parser.parse_args().file.read_text())
    print(f"`{result['command']}`, {result['machine']['processor']}, {result['versions']}\n")
    print(tables(result))


if __name__ == "__main__":
    main()
