"""A stage says what is trained, on what, with which objective; the loop in `fit.py` does the rest."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from mixwright.data.collate import Batch
from mixwright.training.fitted import Fitted
from mixwright.training.gates import Findings
from mixwright.training.job import Job
from mixwright.training.objectives import supervised

Objective = Callable[[Any, Batch], Tensor]


@runtime_checkable
class JointObjective(Protocol):
    """An objective that can take several batches of an update at once, where they share work."""

    at_once: int
    """How many it is given at most."""

    def __call__(self, model: Any, batch: Any, /) -> Tensor:
        """The loss of one."""
        ...

    def together(self, model: Any, batches: Sequence[Any], /) -> Tensor:
        """The summed loss of the batches, with one backward pass for all."""
        ...


@dataclass(frozen=True, kw_only=True)
class ParamGroup:
    """Parameters that learn alike. Whatever no group of a stage selects stays frozen."""

    select: tuple[str, ...]
    """Globs over parameter names; one that selects nothing is an error."""
    lr: float
    """Learning rate after the warm-up."""
    maximize: bool = False
    """Climb instead of descend: Lagrange multipliers."""
    split: Literal["train", "val"] = "train"
    """Whose batches give the gradient: `val` for parameters that learn on held-out data."""
    name: str = ""
    """For plans; the globs where it is empty."""
    optimizer: Literal["adamw", "sgd", "lazy_adamw", "rowwise_adagrad", "exponentiated_gradient", "dual_ascent"] = (
        "adamw"
    )
    """What learns tables of neurons: AdamW over every row, the same over retrieved rows only, or row-wise Adagrad.
    Parameters of the group that are no table have AdamW in any case. `exponentiated_gradient` learns the logits of
    mixture weights, and nothing else. `sgd` adds its weight decay to the gradient. `dual_ascent` climbs the multipliers
    of constraints, whose gradients are the violations, and restarts them at 0 where a constraint is kept."""
    momentum: float = 0.0
    """Of `sgd`; the others have their own."""
    lr_end: float = 1.0
    """Share of `lr` that is left at the last step, falling linearly: tables may begin at 4 to 10 times the rate of the
    rest and end at it (Huang et al. 2024, arXiv 2411.12364)."""
    delay: float = 0.0
    """Share of the steps before it learns: until then it is frozen, and its optimiser has seen nothing."""
    clip: bool | float = True
    """Whether its gradient counts in the norm that the stage clips, and is clipped: not where it lives on another
    scale than the rest, as mixture weights do. A number: the largest norm of this group by itself."""
    weight_decay: float | None = None
    """Decoupled weight decay, but of `sgd`; None: the stage's."""
    turn: tuple[int, int] | None = None
    """(which, of how many): it learns in every so many steps only, and is frozen in the turns of others."""

    def is_awake(self, step: int, steps: int) -> bool:
        """Whether it learns in update `step` (from 0) of `steps`."""
        return step >= int(self.delay * steps) and (self.turn is None or step % self.turn[1] == self.turn[0])


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What is trained, for how long, to which end."""

    name: str
    """For messages, folders and `--stage`."""
    groups: tuple[ParamGroup, ...]
    """What learns; no parameter in two groups."""
    steps: int
    """Optimiser steps."""
    objective: Objective = supervised
    """(model, batch) -> the loss summed over the batch's targets; the loop divides by their number in the step.
    A `JointObjective` is given several batches at once."""
    warmup: float = 0.06
    """Share of the steps in which the learning rates rise from 0, which the first step has; constant afterwards."""
    cooldown: float = 0.0
    """Share of the steps, the last ones, in which they fall towards 0 again."""
    fall: Literal["linear", "cosine"] = "linear"
    """How they fall: evenly, or by half a cosine."""
    clip: float | None = 1.0
    """Largest global norm of the gradient; None does not clip."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon`: hidden matrices by Muon, everything else by AdamW; groups with an optimiser of their own keep it."""
    weight_decay: float = 0.0
    """Decoupled weight decay of every group."""
    choose_every: int | None = None
    """Score on held-out data before the first step and after every so many, and end with the best; None: the last."""
    data: Literal["train", "new_tasks"] = "train"
    """What is learned: `data.train` or `data.tasks` of the recipe, or its `data.new_tasks`."""
    build: Callable[[nn.Module, int, Any], nn.Module] | None = None
    """(backbone, seed, what the stage before left) -> the model that is trained; None: the caller builds it. A stage
    leaves a `Trained` expert or, where compositions are trained, the composed model; the first stage may find None."""
    harvest: Callable[[nn.Module], "Trained"] | None = None
    """What the trained model leaves for the catalogue; None: nothing."""
    watch: Callable[[nn.Module], Mapping[str, float]] | None = None
    """Numbers about the model in training that are logged beside the loss, without gradients."""
    alarms: Callable[[Mapping[str, float]], Mapping[str, str]] | None = None
    """Which of these numbers are bad news: the name of each alarm, and what it means and what to do, in a sentence."""
    own_way: Callable[[Any, Job, bool], Fitted] | None = None
    """(model, job, quiet): trains in place by itself, calling `fit` as it likes, where one run over `groups` won't do.
    `groups` are then the most that it trains. Such a stage keeps no checkpoints: cut off, it starts over."""
    finish: Callable[[Any, Job], None] | None = None
    """(model, job): what is done with the trained composition before it is saved."""
    choose_groups: Callable[[nn.Module], tuple[ParamGroup, ...]] | None = None
    """What learns, where that depends on the model that was built; then `groups` is not asked."""
    prepare: Callable[[Any, Job, bool], Objective] | None = None
    """(model, job, quiet) -> the objective, where it must see model and data before the first step."""
    examine: Callable[[Any, Job, bool], Findings] | None = None
    """(model, job, quiet): what is measured of the trained composition, and the gates that it must pass."""
    stops: bool = False
    """Whether a gate that is not passed ends the run, or is warned of. Either way the stage is kept."""
    proves_frozen: bool = False
    """Whether digests before and after prove that no parameter outside the groups has changed by a bit."""
    leaves: bool = True
    """Whether it leaves a composition; one that only looks at the one before leaves its record."""

    @property
    def warmup_steps(self) -> int:
        """int(warmup * steps), as the released code of PHATGOOSE has it."""
        return int(self.warmup * self.steps)

    def rate(self, step: int) -> float:
        """The share of the full learning rate that update `step` (from 0) has: linear from 0, then 1, then falling."""
        rising = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        falling = int(self.cooldown * self.steps)
        left = min(1.0, (self.steps - step) / falling) if falling else 1.0
        return min(rising, left if self.fall == "linear" else (1 - math.cos(math.pi * left)) / 2)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """An expert as training leaves it: `(down (rank, d_in), up (d_out, rank), scale)` for each site; gates if any."""

    factors: Mapping[str, tuple[Tensor, Tensor, float]]
    gates: Mapping[str, Tensor] | None = None


def select_parameters(model: nn.Module, groups: Sequence[ParamGroup]) -> list[dict[str, nn.Parameter]]:
    """The parameters of each group by name, in the model's order. A shared parameter goes by its first name.

    Raises ValueError for a glob that selects nothing and a parameter that two groups select.
    """
    parameters = dict(model.named_parameters())
    chosen: list[dict[str, nn.Parameter]] = []
    owner: dict[str, int] = {}
    for index, group in enumerate(groups):
        names = list(_names(parameters, group.select))
        for name in names:
            if name in owner:
                raise ValueError(f"parameter {name} is selected by groups {owner[name]} and {index}; select it in one.")
            owner[name] = index
        chosen.append({name: parameters[name] for name in names})
    return chosen


def _names(parameters: Mapping[str, nn.Parameter], patterns: Sequence[str]) -> Iterator[str]:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in parameters):
            examples = ", ".join(list(parameters)[:3])
            raise ValueError(f"{pattern!r} selects none of the {len(parameters)} parameters ({examples}, ...).")
    for name in parameters:
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            yield name
