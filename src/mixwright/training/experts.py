"""From a recipe to an expert in a catalogue: a method's stages one after another, each of which can be resumed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from mixwright.backbones.hf import provenance
from mixwright.catalog.adapter import LoraFactors
from mixwright.catalog.store import Catalog
from mixwright.config import encode
from mixwright.data.batches import Batches
from mixwright.data.collate import Kind
from mixwright.recipe import ExpertConfig, Recipe
from mixwright.sites import linear_sites
from mixwright.training.fit import fit
from mixwright.training.fitted import Fitted
from mixwright.training.job import Job
from mixwright.training.processes import process_state
from mixwright.training.run import (
    Request,
    StagePlan,
    TrainingReport,
    begin_report,
    choose,
    plan,
    stage_record,
    take_apart,
)
from mixwright.training.stage import Stage, Trained

_TASK_TYPES: Mapping[Kind, str] = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "encoder": "FEATURE_EXTRACTION"}


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """The catalogue that an expert is put into, and what its card will say."""

    expert: ExpertConfig
    catalog: Catalog
    transposed: bool
    """Whether the backbone's layers store their weights as (d_in, d_out), which PEFT wants to be told."""

    @property
    def is_there(self) -> bool:
        """Whether the catalogue has an expert of this id already."""
        return self.expert.id in self.catalog.ids(active=False)

    def files(self, name: str) -> str:
        """The SHA-256 of one of the expert's files."""
        return self.catalog.card(self.expert.id).files[name].sha256


def open_shelf(recipe: Recipe, backbone: nn.Module) -> Shelf:
    """The recipe's catalogue, on this backbone."""
    expert, folder = check_expert(recipe)
    transposed = any(site.transposed for site in linear_sites(backbone).values())
    return Shelf(expert=expert, catalog=Catalog(folder, backbone), transposed=transposed)


def check_expert(recipe: Recipe) -> tuple[ExpertConfig, str]:
    """The expert and the catalogue's folder. Raises ValueError naming a key of the recipe that is missing or wrong."""
    if recipe.catalog is None:
        raise ValueError("recipe.catalog: missing; training needs the folder that the expert is put into.")
    if recipe.expert is None:
        raise ValueError("recipe.expert: missing; training needs the id of the expert that it makes.")
    for key, given in (("composition", recipe.composition), ("data.new_tasks", recipe.data.new_tasks)):
        if given is not None:
            raise ValueError(f"recipe.{key}: {recipe.method} trains experts one at a time and has no use for it.")
    return recipe.expert, recipe.catalog


def train_expert(job: Job, shelf: Shelf, stages: Sequence[Stage], request: Request) -> TrainingReport:
    """Train the stages in order, or one of them, and publish what each leaves.

    The first stage publishes an expert, later ones attach what they add (gates). A stage takes up what the one before
    published, so they may run on different days. `resume` goes on where a run of the same recipe was cut off.

    Raises ValueError for an unknown stage, an expert that exists already, and whatever `fit` refuses.
    """
    chosen = choose(stages, request.only)
    report = begin_report(job, expert=shelf.expert.id)
    first_is_done = shelf.is_there and request.resume and _run_of(shelf) == job.run
    if shelf.is_there and stages[0] in chosen and not first_is_done:
        later = ", ".join(stage.name for stage in stages[1:])
        raise ValueError(
            f"expert {shelf.expert.id} is in the catalogue {shelf.catalog.folder} already"
            f"{', from another run' if request.resume else ''}; choose another expert.id, remove it, or "
            f"{'' if request.resume else 'go on with resume, or '}train only a later stage ({later})."
        )
    if request.dry_run:
        return replace(report, plans=_planned(job, shelf, chosen))
    for stage in chosen:
        if first_is_done and stage is stages[0]:
            report = replace(report, skipped=(*report.skipped, stage.name))
            continue
        fitted = _train(job, shelf, stage, request, first=stage is stages[0])
        report = replace(report, stages={**report.stages, stage.name: fitted})
    return report


def _train(job: Job, shelf: Shelf, stage: Stage, request: Request, *, first: bool) -> Fitted:
    model = _build(stage, job, _before(shelf, first))
    identity = dict(job.identity)
    try:
        if not first:
            identity["expert"] = shelf.files("adapter_model.safetensors")
        fitted = fit(
            model,
            stage,
            _data(job),
            config=job.recipe.train,
            seed=job.recipe.seed,
            folder=job.folder / stage.name,
            validation=job.validation,
            identity=identity,
            resume=request.resume,
            force=request.force,
            quiet=request.quiet,
        )
        if stage.harvest is not None and process_state().is_main_process:
            _publish(job, shelf, stage, stage.harvest(model), fitted, first=first)
    finally:
        take_apart(model)
    process_state().wait_for_everyone()
    return fitted


def _publish(job: Job, shelf: Shelf, stage: Stage, trained: Trained, fitted: Fitted, *, first: bool) -> None:
    data = _data(job)
    record = {
        "run": job.run,
        "method": job.recipe.method,
        "config": dict(job.recipe.config),
        "seed": job.recipe.seed,
        "train": encode(job.recipe.train),
        "data": data.digest,
        "examples": len(data),
        "stages": {stage.name: stage_record(stage, fitted)},
    }
    expert, catalog = shelf.expert, shelf.catalog
    if not first:
        before = catalog.card(expert.id).recipe
        record = {**before, "stages": {**before.get("stages", {}), stage.name: stage_record(stage, fitted)}}
        catalog.attach(expert.id, gates=trained.gates, recipe=record)
        return
    catalog.publish(
        expert.id,
        {path: LoraFactors(*factor) for path, factor in trained.factors.items()},
        peft_config={
            "task_type": _TASK_TYPES[job.kind],
            "base_model_name_or_path": provenance(job.backbone)["path"] or job.recipe.sources()[0].path,
            "fan_in_fan_out": shelf.transposed,
        },
        gates=trained.gates,
        task=expert.task,
        licence=expert.licence,
        recipe=record,
    )


def _planned(job: Job, shelf: Shelf, stages: Sequence[Stage]) -> tuple[StagePlan, ...]:
    plans: list[StagePlan] = []
    before: Trained | None = None
    for index, stage in enumerate(stages):
        if index == 0:
            before = _before(shelf, first=not shelf.is_there)
        model = _build(stage, job, before)
        try:
            plans.append(plan(job, stage, model, _data(job)))
            before = stage.harvest(model) if stage.harvest is not None else before
        finally:
            take_apart(model)
    return tuple(plans)


def _before(shelf: Shelf, first: bool) -> Trained | None:
    """What an earlier stage published of this expert; nothing for the first stage."""
    if first or not shelf.is_there:
        return None
    expert = shelf.catalog.expert(shelf.expert.id)
    return Trained(factors={path: (f.down, f.up, f.scale) for path, f in expert.factors.items()}, gates=expert.gates)


def _build(stage: Stage, job: Job, before: Trained | None) -> nn.Module:
    return job.backbone if stage.build is None else stage.build(job.backbone, job.recipe.seed, before)


def _data(job: Job) -> Batches:
    if job.data is None:
        raise ValueError("recipe.data.train: missing; training needs examples.")
    return job.data


def _run_of(shelf: Shelf) -> str | None:
    return shelf.catalog.card(shelf.expert.id).recipe.get("run")
