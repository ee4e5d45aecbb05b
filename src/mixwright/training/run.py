"""From a recipe to an expert in a catalogue: a method's stages one after another, each of which can be resumed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from mixwright.backbones.hf import provenance
from mixwright.catalog.adapter import LoraFactors
from mixwright.catalog.store import Catalog
from mixwright.composition.model import ComposedModel
from mixwright.config import encode
from mixwright.data.batches import Batches
from mixwright.data.collate import Kind
from mixwright.training.fit import Fitted, fit
from mixwright.training.job import Job
from mixwright.training.memory import estimate_bytes, trainable_count
from mixwright.training.processes import process_state
from mixwright.training.stage import Stage, Trained

_TASK_TYPES: Mapping[Kind, str] = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "encoder": "FEATURE_EXTRACTION"}


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What a stage would do: `trainable` numbers at `sites` layers, `memory` in bytes by what it is for."""

    name: str
    steps: int
    trainable: int
    sites: tuple[str, ...]
    examples_per_step: int
    memory: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """What `train` did, or with `dry_run` would do. `skipped`: stages that an earlier run had finished."""

    expert: str
    kind: str
    examples: int
    validation_examples: int
    longest: int
    """Tokens of the longest of the first examples' inputs."""
    plans: tuple[StagePlan, ...] = ()
    stages: dict[str, Fitted] = field(default_factory=dict[str, Fitted])
    skipped: tuple[str, ...] = ()


def run_stages(
    job: Job,
    stages: Sequence[Stage],
    *,
    only: str | None = None,
    resume: bool = False,
    force: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
) -> TrainingReport:
    """Train the stages in order, or `only` one of them, and publish what each leaves.

    The first stage publishes an expert, later ones attach what they add (gates). A stage takes up what the one before
    published, so they may run on different days. `resume` goes on where a run of the same recipe was cut off.

    Raises ValueError for an unknown stage, an expert that exists already, and whatever `fit` refuses.
    """
    chosen = _choose(stages, only)
    report = TrainingReport(
        expert=job.expert.id,
        kind=job.kind,
        examples=len(job.data),
        validation_examples=0 if job.validation is None else len(job.validation),
        longest=_longest(job.data),
    )
    there = job.expert.id in _ids(job.catalog)
    first_is_done = there and resume and job.catalog.card(job.expert.id).recipe.get("run") == job.run
    if there and stages[0] in chosen and not first_is_done:
        later = ", ".join(stage.name for stage in stages[1:])
        raise ValueError(
            f"expert {job.expert.id} is in the catalogue {job.catalog.folder} already"
            f"{', from another run' if resume else ''}; choose another expert.id, remove it, or "
            f"{'' if resume else 'go on with resume, or '}train only a later stage ({later})."
        )
    if dry_run:
        return _planned(job, chosen, report)
    for stage in chosen:
        if first_is_done and stage is stages[0]:
            report = replace(report, skipped=(*report.skipped, stage.name))
            continue
        fitted = _train(job, stage, first=stage is stages[0], resume=resume, force=force, quiet=quiet)
        report = replace(report, stages={**report.stages, stage.name: fitted})
    return report


def _train(job: Job, stage: Stage, *, first: bool, resume: bool, force: bool, quiet: bool) -> Fitted:
    model = _build(stage, job, _before(job, first))
    identity = dict(job.identity)
    try:
        if not first:
            identity["expert"] = job.catalog.card(job.expert.id).files["adapter_model.safetensors"].sha256
        fitted = fit(
            model,
            stage,
            job.data,
            config=job.recipe.train,
            seed=job.recipe.seed,
            folder=job.folder / stage.name,
            validation=job.validation,
            identity=identity,
            resume=resume,
            force=force,
            quiet=quiet,
        )
        if stage.harvest is not None and process_state().is_main_process:
            _publish(job, stage, stage.harvest(model), fitted, first=first)
    finally:
        _take_apart(model)
    process_state().wait_for_everyone()
    return fitted


def _publish(job: Job, stage: Stage, trained: Trained, fitted: Fitted, *, first: bool) -> None:
    record = {
        "run": job.run,
        "method": job.recipe.method,
        "config": dict(job.recipe.config),
        "seed": job.recipe.seed,
        "train": encode(job.recipe.train),
        "data": job.data.digest,
        "examples": len(job.data),
        "stages": {stage.name: _stage_record(stage, fitted)},
    }
    if not first:
        before = job.catalog.card(job.expert.id).recipe
        record = {**before, "stages": {**before.get("stages", {}), stage.name: _stage_record(stage, fitted)}}
        job.catalog.attach(job.expert.id, gates=trained.gates, recipe=record)
        return
    job.catalog.publish(
        job.expert.id,
        {path: LoraFactors(*factor) for path, factor in trained.factors.items()},
        peft_config={
            "task_type": _TASK_TYPES[job.kind],
            "base_model_name_or_path": provenance(job.backbone)["path"] or job.recipe.backbone.path,
            "fan_in_fan_out": job.transposed,
        },
        gates=trained.gates,
        task=job.expert.task,
        licence=job.expert.licence,
        recipe=record,
    )


def _planned(job: Job, stages: Sequence[Stage], report: TrainingReport) -> TrainingReport:
    plans: list[StagePlan] = []
    before: Trained | None = None
    for index, stage in enumerate(stages):
        if index == 0:
            before = _before(job, first=before is None and job.expert.id not in _ids(job.catalog))
        model = _build(stage, job, before)
        try:
            plans.append(_plan(job, stage, model))
            before = stage.harvest(model) if stage.harvest is not None else before
        finally:
            _take_apart(model)
    return replace(report, plans=tuple(plans))


def _plan(job: Job, stage: Stage, model: nn.Module) -> StagePlan:
    train = job.recipe.train
    return StagePlan(
        name=stage.name,
        steps=stage.steps,
        trainable=trainable_count(model, stage),
        sites=tuple(getattr(model, "mixtures", {})),
        examples_per_step=train.batch_size * train.accumulate * process_state().num_processes,
        memory=estimate_bytes(model, stage, job.data),
    )


def _choose(stages: Sequence[Stage], only: str | None) -> tuple[Stage, ...]:
    chosen = tuple(stage for stage in stages if only in (None, stage.name))
    if not chosen:
        raise ValueError(f"stage {only!r}: expected one of {', '.join(stage.name for stage in stages)}.")
    return chosen


def _before(job: Job, first: bool) -> Trained | None:
    """What an earlier stage published of this expert; nothing for the first stage."""
    if first or job.expert.id not in _ids(job.catalog):
        return None
    expert = job.catalog.expert(job.expert.id)
    return Trained(factors={path: (f.down, f.up, f.scale) for path, f in expert.factors.items()}, gates=expert.gates)


def _build(stage: Stage, job: Job, before: Trained | None) -> nn.Module:
    return job.backbone if stage.build is None else stage.build(job.backbone, job.recipe.seed, before)


def _take_apart(model: nn.Module) -> None:
    if isinstance(model, ComposedModel):
        model.remove()


def _ids(catalog: Catalog) -> tuple[str, ...]:
    return catalog.ids(active=False)


def _longest(data: Batches) -> int:
    return data.collate(data.examples[:256]).inputs["input_ids"].shape[1]


def _stage_record(stage: Stage, fitted: Fitted) -> dict[str, Any]:
    """What the card says about a stage."""
    return {
        "steps": stage.steps,
        "optimizer": stage.optimizer,
        "learning_rates": [group.lr for group in stage.groups],
        "warmup_steps": stage.warmup_steps,
        "clip": stage.clip,
        "loss": fitted.loss,
        "kept_step": fitted.steps if fitted.best is None else fitted.best[0],
        "held_out_loss": None if fitted.best is None else fitted.best[1],
    }
