"""How mixture weights moved in training, read from the logs of one run or of several that differ in their seed.

A stage that trains a hybrid logs `weight.<slot>.<component>` beside its loss.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOG, RECORD = "log.jsonl", "trained.json"
PREFIX = "weight."
_STILL = 1e-6


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One weight in one stage: at each of `steps` the mean, the smallest and the largest over `runs` runs."""

    stage: str
    slot: str
    component: str
    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]
    runs: int

    @property
    def moved(self) -> float:
        """How far it went from its smallest mean to its largest."""
        return max(self.mean) - min(self.mean)


def trajectories(folders: Sequence[str | Path], slots: Sequence[str], components: Sequence[str]) -> list[Trajectory]:
    """Of every weight of every stage that logged any, at the steps that all runs of the stage logged.

    `folders`: `output_dir` of each run, or the folder of one stage. Raises ValueError for a folder without a log of
    weights, and for a line of a log that is no JSON object.
    """
    found: dict[str, list[dict[int, dict[str, float]]]] = {}
    for folder in folders:
        stages = _stages(Path(folder))
        if not stages:
            raise ValueError(
                f"{folder}: no {LOG} with {PREFIX}<slot>.<component> in it or in its folders; give the output_dir of a "
                "run that trained mixture weights."
            )
        for stage, log in stages.items():
            found.setdefault(stage, []).append(log)
    names = [(slot, component) for slot in slots for component in components]
    made = [_one(stage, runs, *name) for stage, runs in found.items() for name in names]
    return [one for one in made if one is not None]


def _one(stage: str, runs: Sequence[dict[int, dict[str, float]]], slot: str, component: str) -> Trajectory | None:
    key = f"{PREFIX}{slot}.{component}"
    each = [{step: row[key] for step, row in run.items() if key in row} for run in runs]
    steps = sorted(set.intersection(*(set(run) for run in each)))
    if not steps:
        return None
    columns = [[run[step] for run in each] for step in steps]
    return Trajectory(
        stage=stage,
        slot=slot,
        component=component,
        steps=steps,
        mean=[sum(column) / len(column) for column in columns],
        low=[min(column) for column in columns],
        high=[max(column) for column in columns],
        runs=len(runs),
    )


def _stages(folder: Path) -> dict[str, dict[int, dict[str, float]]]:
    """Stage -> step -> what was logged; of stages that logged weights, in the order in which they were written."""
    logs = [folder / LOG] if (folder / LOG).is_file() else list(folder.glob(f"*/{LOG}"))
    read = {log.parent.name: _read(log) for log in sorted(logs, key=lambda log: (log.stat().st_mtime, log.parent.name))}
    return {stage: log for stage, log in read.items() if any(k.startswith(PREFIX) for row in log.values() for k in row)}


def _read(log: Path) -> dict[int, dict[str, float]]:
    rows: dict[int, dict[str, float]] = {}
    for number, line in enumerate(log.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            rows[int(row["step"])] = {str(k): float(v) for k, v in row.items() if isinstance(v, int | float)}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{log}, line {number}: expected a JSON object with `step`; got {line[:60]!r}.") from None
    return rows


def still(trajectory: Trajectory) -> bool:
    """Whether the weight stood where it was, in every run."""
    return max(trajectory.high) - min(trajectory.low) < _STILL


def recorded_verdicts(folders: Sequence[str | Path]) -> list[dict[str, Any]]:
    """The verdicts that stages of these runs wrote into their records, with the run's name where there are several.

    These were made where components could be trained on as many tokens as the hybrid. Raises ValueError for a record
    that is no JSON object.
    """
    found: list[dict[str, Any]] = []
    for folder in map(Path, folders):
        for record in sorted(folder.glob(f"*/{RECORD}")) + sorted(folder.glob(RECORD)):
            found += [{**one, "run": folder.name} if len(folders) > 1 else one for one in verdicts_in(record)]
    return found


def verdicts_in(file: Path) -> list[dict[str, Any]]:
    """The `verdicts` of a JSON object, or of its `findings`; none where it has none. Raises ValueError, naming it."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        held = content.get("findings") or content
        listed = held.get("verdicts") or []
        return [dict(one) for one in listed]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: no JSON object with a list of verdicts ({error}).") from None
