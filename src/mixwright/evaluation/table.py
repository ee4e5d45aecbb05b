"""One table of systems against tasks: values with intervals, differences that are paired, JSON, markdown."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mixwright.evaluation.intervals import Interval, bootstrap_mean, interval, resampled_means
from mixwright.evaluation.scores import LOWER_IS_BETTER

BEST_SINGLE = "best single expert"
ORACLE = "oracle (best expert per task)"


@dataclass(frozen=True)
class Scores:
    """What one system got on one task in one run (`seed`), example by example."""

    system: str
    task: str
    metric: str
    values: Float[Tensor, " examples"]
    seed: int = 0


@dataclass
class Table:
    """Scores of several systems on the same examples.

    The mean over tasks is unweighted: every (task, seed) counts the same, whatever its number of examples. Intervals
    resample examples within each (task, seed), with the same draws for all systems.
    """

    scores: list[Scores] = field(default_factory=list)

    def add(self, scores: Scores) -> None:
        """One more cell."""
        self.scores.append(scores)

    @property
    def systems(self) -> list[str]:
        """In the order in which they were measured."""
        return list(dict.fromkeys(score.system for score in self.scores))

    @property
    def tasks(self) -> list[str]:
        """In the order in which they were measured."""
        return list(dict.fromkeys(score.task for score in self.scores))

    @property
    def metrics(self) -> list[str]:
        """In the order in which they were measured."""
        return list(dict.fromkeys(score.metric for score in self.scores))

    def cells(self, metric: str, tasks: Sequence[str] | None = None) -> dict[tuple[str, int], dict[str, Tensor]]:
        """(task, seed) -> system -> one value for each example."""
        found: dict[tuple[str, int], dict[str, Tensor]] = {}
        for score in self.scores:
            if score.metric == metric and (tasks is None or score.task in tasks):
                found.setdefault((score.task, score.seed), {})[score.system] = score.values
        return found

    def means(self, metric: str, tasks: Sequence[str] | None = None, *, seed: int | None = None) -> dict[str, float]:
        """System -> unweighted mean over (task, seed)."""
        cells = [row for (_, run), row in self.cells(metric, tasks).items() if seed is None or run == seed]
        return {
            system: sum(float(row[system].double().mean()) for row in cells) / len(cells)
            for system in self.systems
            if cells and all(system in row for row in cells)
        }

    def intervals(self, metric: str, tasks: Sequence[str] | None = None) -> dict[str, Interval]:
        """System -> its mean over tasks with an interval."""
        draws, count = self._draws(metric, tasks)
        means = self.means(metric, tasks)
        return {system: interval(means[system], column, count) for system, column in draws.items()}

    def differences(self, metric: str, reference: str, tasks: Sequence[str] | None = None) -> dict[str, Interval]:
        """System -> its mean minus that of `reference`, paired by example."""
        draws, count = self._draws(metric, tasks)
        means = self.means(metric, tasks)
        if reference not in draws:
            raise ValueError(f"no system {reference!r} was measured by {metric!r}; there are {', '.join(draws)}.")
        return {
            system: interval(means[system] - means[reference], column - draws[reference], count)
            for system, column in draws.items()
        }

    def _draws(self, metric: str, tasks: Sequence[str] | None) -> tuple[dict[str, Tensor], int]:
        cells = self.cells(metric, tasks)
        systems = list(self.means(metric, tasks))
        if not systems:
            raise ValueError(f"nothing was measured by {metric!r}; there are {', '.join(self.metrics)}.")
        total = torch.zeros((), dtype=torch.float64)
        count = 0
        for number, row in enumerate(cells.values()):
            values = torch.stack([row[system] for system in systems])
            total = total + resampled_means(values, seed=number) / len(cells)
            count += values.shape[1]
        return {system: total[:, at] for at, system in enumerate(systems)}, count

    def with_best_experts(self, experts: Sequence[str]) -> "Table":
        """With two rows more, both chosen on the test scores themselves and so upper references: the expert that is
        best on average, and the best expert of each task, chosen for each metric and seed."""
        added: list[Scores] = []
        for metric in self.metrics:
            better = min if metric in LOWER_IS_BETTER else max
            for seed in sorted({score.seed for score in self.scores}):
                means = self.means(metric, seed=seed)
                single = better((name for name in experts if name in means), key=means.__getitem__, default=None)
                for (task, run), row in self.cells(metric).items():
                    if run != seed or single is None:
                        continue
                    own = better((n for n in experts if n in row), key=lambda n, r=row: float(r[n].double().mean()))
                    added.append(Scores(BEST_SINGLE, task, metric, row[single], seed))
                    added.append(Scores(ORACLE, task, metric, row[own], seed))
        return Table([*self.scores, *added])

    def records(self) -> list[dict[str, Any]]:
        """Plain rows for JSON: system, task, metric, value, stderr, low, high, n, seed."""
        rows: list[dict[str, Any]] = []
        for score in self.scores:
            found = bootstrap_mean(score.values)
            rows.append(
                {"system": score.system, "task": score.task, "metric": score.metric, "value": found.value}
                | {"stderr": found.stderr, "low": found.low, "high": found.high, "n": found.n, "seed": score.seed}
            )
        return rows

    def rows(self, metric: str, reference: str | None = None) -> tuple[list[str], list[list[str]]]:
        """Column names and cells of text, best mean first: the mean, its interval, the difference to `reference`."""
        means = self.intervals(metric)
        gaps = self.differences(metric, reference) if reference is not None else {}
        columns = ["system", f"mean {metric}", "95 %", *([f"minus {reference}", "95 %"] if gaps else []), *self.tasks]
        order = sorted(means, key=lambda system: means[system].value, reverse=metric not in LOWER_IS_BETTER)
        return columns, [
            [system, *_shown(means[system], gaps.get(system)), *self._each(system, metric)] for system in order
        ]

    def _each(self, system: str, metric: str) -> list[str]:
        by_task = [self.means(metric, [task]).get(system) for task in self.tasks]
        return ["-" if value is None else f"{value:.3f}" for value in by_task]


def _shown(mean: Interval, gap: Interval | None) -> list[str]:
    shown = [f"{mean.value:.3f}", f"{mean.low:.3f} .. {mean.high:.3f}"]
    return shown if gap is None else [*shown, f"{gap.value:+.3f}", f"{gap.low:+.3f} .. {gap.high:+.3f}"]


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
