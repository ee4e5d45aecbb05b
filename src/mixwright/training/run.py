"""What running a method's stages has in common, whether they leave an expert or a composition."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mixwright.composition.model import ComposedModel
from mixwright.data.batches import Batches
from mixwright.training.fitted import Fitted
from mixwright.training.forecast import seconds_per_step
from mixwright.training.job import Job
from mixwright.training.memory import estimate_bytes, trainable_counts
from mixwright.training.processes import process_state
from mixwright.training.stage import Stage


@dataclass(frozen=True, kw_only=True)
class Request:
    """How a run is asked for. `only`: one stage alone. `resume`: go on where the same run was cut off. `force`: with
    `resume`, in spite of changed settings; without, start over. `dry_run`: say what would be done."""

    only: str | None = None
    resume: bool = False
    force: bool = False
    dry_run: bool = False
    quiet: bool = False


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What a stage would do: `trainable` numbers at `sites` layers, `groups` of them with their learning rates,
    `memory` in bytes by what it is for."""

    name: str
    steps: int
    trainable: int
    groups: dict[str, tuple[int, float]]
    at_most: bool
    """Whether the stage finds out by itself what it trains of `groups`."""
    sites: tuple[str, ...]
    examples_per_step: int
    memory: dict[str, int]
    seconds_per_step: float | None = None
    """Measured here on twenty steps that learn nothing, where several models are composed; None: not measured."""
    cost: str = ""
    """What the model costs, in words, where it can say."""


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """What `train` did, or with `dry_run` would do. `skipped`: stages that an earlier run had finished."""

    kind: str
    examples: int
    validation_examples: int
    longest: int
    """Tokens of the longest input among examples from all over the data."""
    expert: str | None = None
    """The id of the expert that was trained."""
    composition: str | None = None
    """The folder of the last composition that was saved."""
    tasks: dict[str, int] = field(default_factory=dict[str, int])
    """Examples of each task, where several are learned together."""
    validation_tasks: dict[str, int] = field(default_factory=dict[str, int])
    """Held-out examples of each of them that has any."""
    new_tasks: dict[str, int] = field(default_factory=dict[str, int])
    """Examples of each task that a composition is carried over to."""
    domains: dict[str, int] = field(default_factory=dict[str, int])
    """Items of each domain that episodes are drawn from; those looked at have held-out episodes instead."""
    plans: tuple[StagePlan, ...] = ()
    stages: dict[str, Fitted] = field(default_factory=dict[str, Fitted])
    skipped: tuple[str, ...] = ()


def begin_report(job: Job, **more: Any) -> TrainingReport:
    """What is known before anything is trained."""
    return TrainingReport(
        kind=job.kind,
        examples=0 if job.data is None else len(job.data),
        validation_examples=0 if job.validation is None else len(job.validation),
        longest=0 if job.data is None or job.domains else job.data.spread(256).inputs["input_ids"].shape[1],
        tasks={} if job.data is None else job.data.tasks,
        validation_tasks={} if job.validation is None else job.validation.tasks,
        new_tasks={name: len(task) for name, task in (job.supports or job.new_tasks).items()},
        domains=dict(job.domains),
        **more,
    )


def choose(stages: Sequence[Stage], only: str | None) -> tuple[Stage, ...]:
    """All stages, or the one called `only`. Raises ValueError where there is none of this name."""
    chosen = tuple(stage for stage in stages if only in (None, stage.name))
    if not chosen:
        raise ValueError(f"stage {only!r}: expected one of {', '.join(stage.name for stage in stages)}.")
    return chosen


def plan(job: Job, stage: Stage, model: nn.Module, data: Batches) -> StagePlan:
    """What a stage would do to its model."""
    train = job.recipe.train
    counts = trainable_counts(model, stage)
    return StagePlan(
        name=stage.name,
        steps=stage.steps,
        trainable=sum(counts),
        groups={
            group.name or ", ".join(group.select): (count, group.lr)
            for group, count in zip(stage.groups, counts, strict=True)
        },
        at_most=stage.own_way is not None,
        sites=tuple(getattr(model, "mixtures", {})),
        examples_per_step=(1 if job.domains or job.supports else train.batch_size)
        * train.accumulate
        * process_state().num_processes,
        memory=estimate_bytes(model, stage, data),
        seconds_per_step=_timed(job, stage, model, data),
        cost=model.cost_text() if isinstance(model, ComposedModel) else "",
    )


def _timed(job: Job, stage: Stage, model: nn.Module, data: Batches) -> float | None:
    if not isinstance(job.backbone, nn.ModuleList) or stage.own_way is not None or not stage.steps:
        return None
    if not stage.groups:
        return None
    return seconds_per_step(model, stage, data, job.recipe.train.accumulate)


def stage_record(stage: Stage, fitted: Fitted) -> dict[str, Any]:
    """What is written down about a stage that was trained."""
    return {
        "steps": stage.steps,
        "optimizer": stage.optimizer,
        "learning_rates": [group.lr for group in stage.groups],
        "warmup_steps": stage.warmup_steps,
        "clip": stage.clip,
        "loss": fitted.loss,
        "seconds": fitted.seconds,
        "predicted_seconds": fitted.predicted,
        "kept_step": fitted.steps if fitted.best is None else fitted.best[0],
        "held_out_loss": None if fitted.best is None else fitted.best[1],
    }


def take_apart(model: nn.Module | None) -> None:
    """Give the backbone back as it was."""
    if isinstance(model, ComposedModel):
        model.remove()
