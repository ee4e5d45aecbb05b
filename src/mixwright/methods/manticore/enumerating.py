"""Searches that train one choice of mixture weights after another, from the same start: the grid, and halving."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import ceil, comb, log2
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn

from mixwright.data.batches import Batches
from mixwright.methods.manticore.config import ManticoreConfig
from mixwright.methods.manticore.controls import simplex
from mixwright.methods.manticore.losses import mean_loss
from mixwright.methods.manticore.model import HybridModel
from mixwright.methods.manticore.searching import component_groups
from mixwright.training.fit import fit
from mixwright.training.fitted import Fitted
from mixwright.training.job import Job
from mixwright.training.progress import Report, reporting
from mixwright.training.stage import Stage

Choice = tuple[tuple[float, ...], ...]
"""A row of weights for each block."""

MOST_POINTS = 121
"""An 11-point grid for two blocks of two components."""
MOST_PATHS = 64
FINEST = 10


@dataclass(frozen=True)
class Tried:
    """A choice, the steps that it was trained for, and its held-out loss then."""

    weights: Choice
    steps: int
    loss: float


def grid_choices(num_blocks: int, models: int) -> tuple[Choice, ...]:
    """Every choice of weights that are multiples of 1/n, with the largest n up to 10 for which they are few enough.

    Two components and one block: 11 points. Raises ValueError where only one-hot weights would be left.
    """
    for parts in range(FINEST, 1, -1):
        if comb(parts + models - 1, models - 1) ** num_blocks <= MOST_POINTS:
            return tuple(product(tuple(simplex(parts, models)), repeat=num_blocks))
    raise ValueError(
        f"config.search=grid: {num_blocks} blocks of {models} components have more than {MOST_POINTS} points even at "
        "steps of a half, and each is a run of its own. Search by gradients (darts, gaea), or take fewer blocks."
    )


def one_hot_choices(num_blocks: int, models: int) -> tuple[Choice, ...]:
    """Every way to give each block to one component. Raises ValueError for more than 64."""
    if models**num_blocks > MOST_PATHS:
        raise ValueError(
            f"config.search=halving: {models} components in {num_blocks} blocks have {models**num_blocks} paths, more "
            f"than {MOST_PATHS}. Search by gradients (darts, gaea), or take fewer blocks."
        )
    rows = tuple(tuple(float(m == chosen) for m in range(models)) for chosen in range(models))
    return tuple(product(rows, repeat=num_blocks))


def search_grid(model: HybridModel, job: Job, stage: Stage, config: ManticoreConfig, *, quiet: bool) -> "Found":
    """Train every point for all steps; the model is left as the best one left it."""
    choices = grid_choices(model.backbone.num_blocks, len(model.experts))
    return _Runs(model, job, stage, config).rounds([(choices, stage.steps)], quiet=quiet)


def search_halving(model: HybridModel, job: Job, stage: Stage, config: ManticoreConfig, *, quiet: bool) -> "Found":
    """Successive halving (Jamieson and Talwalkar 2016) over one-hot paths: the better half goes on to twice the steps.

    Each round trains anew, so that nothing but losses is kept of a path; the last one has all steps.
    """
    choices = one_hot_choices(model.backbone.num_blocks, len(model.experts))
    rounds = max(1, ceil(log2(len(choices))))
    budgets = [max(1, stage.steps >> (rounds - 1 - number)) for number in range(rounds)]
    keep = [ceil(len(choices) / 2**number) for number in range(rounds)]
    plan = [(choices if number == 0 else count, steps) for number, (count, steps) in enumerate(zip(keep, budgets))]
    return _Runs(model, job, stage, config).rounds(plan, quiet=quiet)


@dataclass(frozen=True)
class Found:
    """What a search came to: `tried` in the order in which they were."""

    fitted: Fitted
    tried: tuple[Tried, ...]

    def plain(self) -> list[dict[str, Any]]:
        """For the record."""
        return [{"weights": one.weights, "steps": one.steps, "loss": one.loss} for one in self.tried]


class _Runs:
    """Runs from one start, of which the best is kept."""

    def __init__(self, model: HybridModel, job: Job, stage: Stage, config: ManticoreConfig) -> None:
        if job.validation is None:
            raise ValueError(f"config.search={config.search} compares runs on held-out data; give data.validation.")
        self.model, self.job, self.stage, self.config = model, job, stage, config
        self.validation: Batches = job.validation
        self.start = _copied(model)
        self.best: tuple[Tried, dict[str, Tensor]] | None = None
        self.tried: list[Tried] = []
        self.seconds = 0.0

    def rounds(self, plan: Sequence[tuple[tuple[Choice, ...] | int, int]], *, quiet: bool) -> Found:
        """`plan`: the choices of a round, or how many of the best of the one before, and their steps."""
        began, choices = monotonic(), list[Choice]()
        total = sum(given if isinstance(given, int) else len(given) for given, _ in plan)
        with reporting(f"{self.stage.name} ({self.config.search})", total, 0, quiet=quiet) as report:
            for given, steps in plan:
                choices = self._survivors(given, len(choices)) if isinstance(given, int) else list(given)
                self.best = None  # only runs of equal length are compared
                for choice in choices:
                    self._run(choice, steps, report)
        assert self.best is not None
        _restore(self.model, self.best[1])
        one = self.best[0]
        said = f"{len(self.tried)} runs; the best on held-out data: {one.loss:.4f} with {_shown(one.weights)}."
        steps = sum(tried.steps for tried in self.tried)
        fitted = Fitted(steps=steps, loss=None, best=(one.steps, one.loss), seconds=monotonic() - began, said=said)
        return Found(fitted, tuple(self.tried))

    def _survivors(self, count: int, before: int) -> list[Choice]:
        ranked = sorted(self.tried[-before:], key=lambda one: one.loss)
        return [one.weights for one in ranked[:count]]

    def _run(self, choice: Choice, steps: int, report: Report) -> None:
        _restore(self.model, self.start)
        self.model.mixture_weights = choice
        stage = replace(self.stage, steps=steps, groups=component_groups(self.model, self.config), own_way=None)
        assert self.job.data is not None
        fit(
            self.model,
            replace(stage, choose_every=None),
            self.job.data,
            config=self.job.recipe.train,
            seed=self.job.recipe.seed,
        )
        one = Tried(choice, steps, mean_loss(self.model, self.validation))
        self.tried.append(one)
        if self.best is None or one.loss < self.best[0].loss:
            self.best = (one, _copied(self.model))
        report.step(len(self.tried), one.loss)


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def _restore(model: nn.Module, state: dict[str, Tensor]) -> None:
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor.copy_(state[name])


def _shown(choice: Choice) -> str:
    return "; ".join(" / ".join(f"{weight:.2f}" for weight in row) for row in choice)
