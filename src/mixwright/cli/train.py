"""`train`: out of a recipe, an expert and its gate, or a composition."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixwright.cli.output import DryRun, Json, Settings, console, example, print_json, print_table

if TYPE_CHECKING:
    from mixwright.training.run import TrainingReport

_RECIPE = (
    "cat law.yaml",
    "backbone: my-backbone",
    "catalog: my-catalog",
    "output_dir: runs/law",
    "expert: {id: law, task: answer questions about contracts}",
    "data: {train: law.jsonl, validation: law-held-out.jsonl}",
    "config: {rank: 16}",
    "mixwright train law.yaml --dry-run",
    "mixwright train law.yaml",
    "mixwright train law.yaml --resume",
    "mixwright train law.yaml --stage gate --set config.gate_steps=200",
    "torchrun --nproc-per-node 4 -m mixwright train law.yaml",
    "",
    "cat tasks.yaml",
    "method: tensorpoly",
    "backbone: my-backbone",
    "output_dir: runs/tasks",
    "data: {tasks: {nli: data/nli, paraphrase: data/paraphrase}, new_tasks: {irony: few.jsonl}}",
    "mixwright train tasks.yaml",
    "mixwright explain runs/tasks/transfer/composition",
)


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("train", rich_help_panel="Make", epilog=example(*_RECIPE))(train)


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file; `mixwright schema NAME` prints one.")],
    stage: Annotated[str | None, typer.Option("--stage", help="Run one stage of the method alone.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the same run was cut off.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="With --resume: in spite of changed settings. Without: start over.")
    ] = False,
    dry_run: DryRun = False,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Train as a recipe says, stage after stage: an expert, for the catalogue, or a composition, into output_dir.

    Rows of a JSONL file are prompt and completion, text, or text and label. A run that was cut off, however, loses at
    most the steps since its last checkpoint (train.checkpoint_every); --resume goes on to the same weights.
    """
    from mixwright.api import train as run
    from mixwright.recipe import read_recipe

    decoded = read_recipe(recipe, settings or ())
    try:
        report = run(decoded, stage=stage, resume=resume, force=force, dry_run=dry_run, quiet=as_json)
    except KeyboardInterrupt as stopped:
        print(f"mixwright: {stopped}", file=sys.stderr)  # typer keeps the exit code and drops the words
        raise
    from mixwright.training.processes import process_state

    if not process_state().is_main_process:
        return
    if as_json:
        print_json(_plain(report))
    elif dry_run:
        _show_plan(report)
    else:
        _show_result(report, read_recipe(recipe, settings or ()).catalog)


def _plain(report: "TrainingReport") -> dict[str, Any]:
    from dataclasses import asdict

    value = asdict(report)
    for stage in value["stages"].values():
        del stage["losses"]
    return value


def _show_plan(report: "TrainingReport") -> None:
    rows = [
        (
            plan.name,
            plan.steps,
            plan.examples_per_step,
            len(plan.sites),
            f"{plan.trainable:,}",
            *(f"{size / 2**20:,.1f}" for size in plan.memory.values()),
        )
        for plan in report.plans
    ]
    memory = [f"MiB {name}" for name in (report.plans[0].memory if report.plans else ())]
    print_table(("stage", "steps", "examples/step", "sites", "trained numbers", *memory), rows)
    say = console().print
    for plan in report.plans:
        parts = (f"{name}: {count:,} at rate {rate:g}" for name, (count, rate) in plan.groups.items())
        most = " at most" if plan.at_most and plan.groups else ""
        say(f"{plan.name} trains{most} {'; '.join(parts) or 'no weight'}", markup=False)
        if plan.seconds_per_step is not None:
            hours = plan.steps * plan.seconds_per_step / 3600
            say(f"{plan.name}: about {hours:.2g} hours ({plan.seconds_per_step:.3g} s a step, by twenty of them)")
    for text in dict.fromkeys(plan.cost for plan in report.plans if plan.cost):
        say(text, markup=False)
    held_out = f", {report.validation_examples} held out" if report.validation_examples else ""
    longest = f"; longest of some: {report.longest} tokens" if report.longest else ""
    examples = f"{report.examples} examples" if report.examples else f"{sum(report.new_tasks.values())} shots"
    say(f"{report.kind} model; {examples}{held_out}{longest}.")
    _say_tasks(report)
    for plan in (plan for plan in report.plans[:1] if plan.sites):
        say(f"sites: {', '.join(plan.sites[:4])}{', ...' if len(plan.sites) > 4 else ''}")
    say("The data was read and checked. Nothing was trained. Activations are measured on one example and scaled up.")


def _say_tasks(report: "TrainingReport") -> None:
    listed = (
        ("tasks", report.tasks),
        ("domains", report.domains),
        ("held out", report.validation_tasks),
        ("new tasks", report.new_tasks),
    )
    for words, tasks in listed:
        if tasks:
            console().print(f"{words}: {', '.join(f'{name} ({count})' for name, count in tasks.items())}", markup=False)
    blind = [name for name in report.tasks if name not in report.validation_tasks]
    if blind and report.validation_tasks:
        console().print(f"without a validation.jsonl, so that no checkpoint is chosen by it: {', '.join(blind)}")


def _show_result(report: "TrainingReport", catalog: str | None) -> None:
    rows = [
        (
            name,
            fitted.steps,
            fitted.loss,
            None if fitted.best is None else fitted.best[0],
            None if fitted.best is None else fitted.best[1],
            round(fitted.seconds, 1),
        )
        for name, fitted in report.stages.items()
    ]
    if rows:
        print_table(("stage", "steps", "last loss", "kept step", "held-out loss", "seconds"), rows)
    say = console().print
    for name, fitted in report.stages.items():
        for task, loss in fitted.held_out.items():
            say(f"{name}: held-out loss of {task}: {loss:.4f}", markup=False)
        if fitted.said:
            say(fitted.said, markup=False)
    if report.skipped:
        say(f"done before: {', '.join(report.skipped)}")
    if any(fitted.best is not None and fitted.best[0] == 0 for fitted in report.stages.values()):
        say("No step was better than the untrained weights on the held-out data; the untrained ones were kept.")
    if report.expert is not None:
        say(
            f"expert {report.expert} is in the catalogue; see it with: mixwright experts show {catalog} {report.expert}"
        )
    if report.composition is not None:
        say(f"the composition is in {report.composition}; see it with: mixwright explain {report.composition}")
        names = [*report.new_tasks, *report.tasks]
        if names and report.kind != "encoder":
            say(f"try it with: mixwright run {report.composition} --task {names[0]} --prompt TEXT", markup=False)
