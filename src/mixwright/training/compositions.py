"""From a recipe to a saved composition: each stage starts from what the one before left, and leaves a folder."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

from torch import nn

from mixwright.composition.components import ledger_of
from mixwright.composition.model import ComposedModel
from mixwright.data.batches import Batches
from mixwright.data.episode_batches import support_batches
from mixwright.data.mixture import numbered
from mixwright.recipe import Recipe
from mixwright.training.fit import fit
from mixwright.training.fitted import Fitted
from mixwright.training.frozen import frozen_digests, proved
from mixwright.training.gates import Findings
from mixwright.training.job import Job
from mixwright.training.left import content_of, folder_of, has_left, is_done, refuse_failed, write_record
from mixwright.training.processes import process_state
from mixwright.training.run import Request, StagePlan, TrainingReport, begin_report, choose, plan, take_apart
from mixwright.training.sources import batches
from mixwright.training.stage import Stage, select_parameters

Load = Callable[[str, nn.Module], ComposedModel]
"""Puts a saved composition, a folder or a hub id, back onto its backbone."""

_LOGGER = logging.getLogger(__name__)


def check_composition(recipe: Recipe) -> None:
    """Raises ValueError naming a key of the recipe that a method which trains compositions has no use for."""
    for key, given in (("expert", recipe.expert), ("catalog", recipe.catalog)):
        if given is not None:
            raise ValueError(
                f"recipe.{key}: {recipe.method} trains a whole composition, which goes to output_dir; leave {key} out."
            )


def with_task_names(recipe: Recipe, config: type[Any]) -> Recipe:
    """The recipe with the names of its tasks in the method's config, where that has `tasks` and the recipe none.

    Raises ValueError for a task that the config does not name.
    """
    names = list(recipe.data.tasks or ())
    if not names or "tasks" not in {field.name for field in fields(config)}:
        return recipe
    given = recipe.config.get("tasks")
    if given is None:
        return replace(recipe, config={**recipe.config, "tasks": names})
    strange = [name for name in names if name not in given]
    if strange:
        raise ValueError(f"recipe.data.tasks.{strange[0]}: config.tasks does not name it ({', '.join(given)}).")
    return recipe


def train_composition(job: Job, stages: Sequence[Stage], load: Load, request: Request) -> TrainingReport:
    """Train the stages whose data the recipe has, in order, or one of them; each leaves `<stage>/composition`.

    The first starts from `recipe.composition`, or afresh; a later one from what the one before left, so that they may
    run on different days. A composition appears whole or not at all, when its stage is done. `resume` goes on where a
    run of the same recipe was cut off. A stage that only looks leaves a record beside where its composition would be.

    Raises ValueError for an unknown stage, one without data, a composition that is there already, a gate that was not
    passed where its stage stops at that, whatever a stage says to what it finds, and whatever `fit` refuses.
    """
    chosen = _chosen(job, stages, request.only)
    report = begin_report(job)
    job = replace(job, load=partial(_loaded, load, job.backbone))
    for stage in chosen:
        if stage.leaves and has_left(job, stage.name) and not (request.resume or request.force):
            raise ValueError(
                f"{folder_of(job, stage.name)} holds what stage {stage.name} left; train only another stage, go on "
                "with resume, take another output_dir, or start over with force."
            )
    if request.dry_run:
        return replace(report, plans=_planned(job, stages, chosen, load))
    for stage in chosen:
        before = _before(job, stages, stage)
        left = {"composition": str(folder_of(job, stage.name))} if stage.leaves else {}
        if request.resume and is_done(job, stage, _identity(job, stage, before)):
            report = replace(report, skipped=(*report.skipped, stage.name), **left)
        else:
            fitted = _train(job, stage, before, load, request)
            report = replace(report, stages={**report.stages, stage.name: fitted}, **left)
        refuse_failed(job, stage)
    return report


def _loaded(load: Load, backbone: nn.Module, folder: str) -> ComposedModel:
    return load(folder, backbone)


def _train(job: Job, stage: Stage, before: str | None, load: Load, request: Request) -> Fitted:
    model = _built(job, stage, None if before is None else load(before, job.backbone))
    try:
        stage = _resolved(stage, model)
        _refuse_unsaved(model, stage)
        still = frozen_digests(model, stage) if stage.proves_frozen else None
        fitted = _fitted(job, stage, model, before, request)
        frozen = None if still is None else proved(still, model, stage)
        if stage.finish is not None:
            stage.finish(model, job)
        findings = Findings() if stage.examine is None else stage.examine(model, job, request.quiet)
        for gate in findings.failed():
            _LOGGER.warning("stage %s: %s", stage.name, gate.said)
        fitted = replace(fitted, said="\n".join(filter(None, (fitted.said, findings.said()))))
        if process_state().is_main_process:
            if stage.leaves:
                model.save_pretrained(folder_of(job, stage.name))
            write_record(job, stage, _identity(job, stage, before), fitted, findings, frozen)
    finally:
        take_apart(model)
    process_state().wait_for_everyone()
    return fitted


def _resolved(stage: Stage, model: ComposedModel) -> Stage:
    """The stage with the groups that it chooses by the model."""
    return stage if stage.choose_groups is None else replace(stage, groups=stage.choose_groups(model))


def _fitted(job: Job, stage: Stage, model: ComposedModel, before: str | None, request: Request) -> Fitted:
    if stage.own_way is not None:
        return stage.own_way(model, job, request.quiet)
    if stage.prepare is not None:
        stage = replace(stage, objective=stage.prepare(model, job, request.quiet))
    known = tuple(getattr(model, "tasks", ()))
    return fit(
        model,
        stage,
        numbered(_data(job, stage), known),
        config=job.recipe.train,
        seed=job.recipe.seed,
        folder=job.folder / stage.name,
        validation=None if job.validation is None else numbered(job.validation, known),
        identity=_identity(job, stage, before),
        resume=request.resume,
        force=request.force,
        quiet=request.quiet,
    )


def _built(job: Job, stage: Stage, before: ComposedModel | None) -> ComposedModel:
    """The model of a stage; the backbone is as it was where there is none."""
    try:
        model = before if stage.build is None else stage.build(job.backbone, job.recipe.seed, before)
        if not isinstance(model, ComposedModel):
            raise ValueError(f"stage {stage.name} builds a {type(model).__name__}; expected a composed model.")
    except BaseException:
        take_apart(before)
        raise
    return model


def _identity(job: Job, stage: Stage, before: str | None) -> dict[str, str]:
    """What the weights of a stage depend on, beside its own settings."""
    identity = {**job.identity, "composition": "none" if before is None else content_of(before)}
    if stage.data == "new_tasks":
        identity["new_tasks"] = _data(job, stage).digest
    return identity


def _chosen(job: Job, stages: Sequence[Stage], only: str | None) -> tuple[Stage, ...]:
    """The stages to run. Raises ValueError for one whose data the recipe does not have."""
    if only is None:
        return _covered(job, stages)
    (stage,) = choose(stages, only)
    if stage not in _covered(job, stages):
        key = "data.new_tasks" if stage.data == "new_tasks" else "data.domains" if job.supports else "data.tasks"
        raise ValueError(f"recipe.{key}: missing; stage {stage.name} learns from it.")
    return (stage,)


def _covered(job: Job, stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """The stages whose data the recipe has."""
    there = {"train": job.data is not None, "new_tasks": bool(job.new_tasks or job.supports)}
    return tuple(stage for stage in stages if there[stage.data])


def _before(job: Job, stages: Sequence[Stage], stage: Stage) -> str | None:
    """What a stage starts from: what the one before it left, if anything; for the first, the recipe's composition.

    Raises ValueError where an earlier one stopped at a gate.
    """
    covered = _covered(job, stages)
    place = covered.index(stage)
    for earlier in covered[:place]:
        refuse_failed(job, earlier)
    leaving = [one for one in covered[:place] if one.leaves]
    if not leaving:
        _refuse_to_guess(job, stages[: stages.index(stage)], stage)
        return job.recipe.composition
    if not has_left(job, leaving[-1].name):
        return None
    return str(folder_of(job, leaving[-1].name))


def _refuse_to_guess(job: Job, earlier: Sequence[Stage], stage: Stage) -> None:
    """An earlier stage's composition that lies there is named, not taken: its settings go with it."""
    found = [folder_of(job, one.name) for one in earlier if has_left(job, one.name)]
    if found and job.recipe.composition is None:
        raise ValueError(
            f"recipe.composition: missing; stage {stage.name} goes on from a trained one. Add `composition: "
            f"{found[-1]}` to the recipe (or --set composition={found[-1]})."
        )


def _data(job: Job, stage: Stage) -> Batches:
    if stage.data == "train":
        assert job.data is not None
        return job.data
    if job.supports:
        return support_batches(job.supports, ",".join(domain.digest for domain in job.supports.values()))
    return batches(job.recipe, tuple(job.new_tasks.values()), job.tokenizer, job.kind, mixed=True)


def _planned(job: Job, stages: Sequence[Stage], chosen: Sequence[Stage], load: Load) -> tuple[StagePlan, ...]:
    """Each stage on the untrained model of the one before."""
    plans: list[StagePlan] = []
    first = _before(job, stages, chosen[0])
    model = None if first is None else load(first, job.backbone)
    try:
        for stage in chosen:
            built = _built(job, stage, model)
            settled = _resolved(stage, built)
            _refuse_unsaved(built, settled)
            data = _data(job, stage)
            known = tuple(getattr(built, "tasks", ()))
            plans.append(plan(job, settled, built, data if stage.own_way else numbered(data, known)))
            if stage.leaves:
                model = built
            elif built is not model:
                take_apart(built)
    finally:
        take_apart(model)
    return tuple(plans)


def _refuse_unsaved(model: ComposedModel, stage: Stage) -> None:
    """A stage that trains what `save_pretrained` does not write would lose it: an error of the method.

    Raises CatalogError (LICENCE) before anything is trained that could not be saved after.
    """
    if stage.leaves:
        ledger_of(model)
    if not stage.leaves:
        return
    kept = {tensor.data_ptr() for tensor in model.kept_tensors()}
    for group in select_parameters(model, stage.groups):
        for name, parameter in group.items():
            assert parameter.data_ptr() in kept, f"stage {stage.name} trains {name}, which is not saved"
