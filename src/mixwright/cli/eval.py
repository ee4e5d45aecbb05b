"""`eval`: backbone, experts, merges and the routed model in one table, in one load of the backbone."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixwright.cli.composition import Backbone, opened
from mixwright.cli.few_shot import evaluate_domains, evaluate_support, reads_episodes
from mixwright.cli.output import Json, console, example, print_json, print_table

if TYPE_CHECKING:
    from mixwright.composition.model import ComposedModel
    from mixwright.evaluation.table import Table

_EXAMPLE = (
    "mixwright eval composed --data law.jsonl --data medicine.jsonl",
    "mixwright eval my-catalog --backbone my-backbone --data held-out.jsonl --systems backbone,merged,routed --json",
    "mixwright eval few-shot-composition --support birds/train --query birds/test",
)
_REFERENCE = "backbone"


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("eval", rich_help_panel="Look at the result", epilog=example(*_EXAMPLE))(evaluate)


def evaluate(
    source: Annotated[
        Path, typer.Argument(metavar="COMPOSITION|CATALOG", help="A folder that `compose` wrote, or one of experts.")
    ],
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="A JSONL file, a folder or a hub id; one task, or few-shot domain, each."),
    ] = None,
    systems: Annotated[
        str | None,
        typer.Option(
            help="Rows, by comma, of backbone, experts, ensemble, merged, average, random, arrow, spectr, routed."
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", help="For a composition routed by task: that of each --data, or one for all."),
    ] = None,
    backbone: Backbone = None,
    method: Annotated[str, typer.Option("--method", help="How to compose, where a catalogue is given.")] = "phatgoose",
    metric: Annotated[str | None, typer.Option("--metric", help="nats, tokens, exact or accuracy.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Examples of each task at most.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Examples in one forward pass.")] = 16,
    max_length: Annotated[int, typer.Option("--max-length", min=2, help="Tokens of a text that are kept.")] = 512,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the random prototypes, or the episodes.")] = 0,
    support: Annotated[
        str | None,
        typer.Option("--support", help="Few-shot: labelled items to learn from: class folders, a table."),
    ] = None,
    query: Annotated[str | None, typer.Option("--query", help="Few-shot: labelled items to be classified.")] = None,
    ways: Annotated[int, typer.Option("--ways", min=2, help="Few-shot: classes of an episode of --data.")] = 5,
    shots: Annotated[int, typer.Option("--shots", min=1, help="Few-shot: items of each class to learn from.")] = 5,
    episodes: Annotated[int, typer.Option("--episodes", min=1, help="Few-shot: episodes of each --data.")] = 100,
    as_json: Json = False,
) -> None:
    """Score the backbone, each expert, merges, and the routed model on the same examples, with intervals.

    The best single expert and the best expert of each task are chosen on these very scores: they are upper references,
    not systems one could deploy. Differences to the backbone are paired by example.
    """
    if reads_episodes(source):
        if data is None:
            evaluate_support(source, support, query, backbone, as_json=as_json)
        else:
            sizes = {"ways": ways, "shots": shots, "episodes": episodes, "seed": seed}
            evaluate_domains(source, data, backbone, **sizes, as_json=as_json)
        return
    if data is None or support is not None or query is not None:
        raise ValueError("give --data; --support and --query are for few-shot compositions.")
    from mixwright.evaluation.evaluate import evaluate as measure
    from mixwright.evaluation.systems import members
    from mixwright.evaluation.tasks import METRIC, chosen_systems, default_systems, file_tasks, kind_of

    model, tokenizer = _model(source, backbone, method)
    names = (
        default_systems(model)
        if systems is None
        else tuple(name.strip() for name in systems.split(",") if name.strip())
    )
    chosen = chosen_systems(model, names, seed=seed)
    tasks = file_tasks(model, tokenizer, data, batch_size=batch_size, max_length=max_length, limit=limit, of_tasks=task)
    table = _measured(measure, model, tasks, chosen, seed, quiet=as_json)
    if "experts" in names:
        table = table.with_best_experts([model.experts[at] for at in members(model)])
    decisive = metric or METRIC[kind_of(model)]
    if decisive not in table.metrics:
        raise ValueError(f"--metric {decisive}: not measured here; there are {', '.join(table.metrics)}.")
    if as_json:
        print_json({"metric": decisive, "means": _means(table, decisive), "scores": table.records()})
        return
    columns, rows = table.rows(decisive, _REFERENCE if _REFERENCE in table.systems else None)
    print_table(columns, rows, title=f"{source}: {decisive} on {len(tasks)} tasks")
    console().print(_verdict(table, decisive), markup=False)


def _model(source: Path, backbone: str | None, method: str) -> tuple["ComposedModel", Any]:
    if (source / "composition.yaml").is_file() or not (source / "catalog.json").is_file():
        return opened(source, backbone)
    if backbone is None:
        raise ValueError(f"{source} is a catalogue; give --backbone FOLDER to compose it with.")
    from mixwright.api import compose
    from mixwright.backbones.hf import load_tokenizer

    return compose(method, backbone=backbone, catalog=source), load_tokenizer(backbone)


def _measured(measure: Any, model: Any, tasks: Any, systems: Any, seed: int, *, quiet: bool) -> "Table":
    from rich.progress import Progress

    with Progress(console=console(), transient=True, disable=quiet) as bar:
        line = bar.add_task("scoring", total=len(systems) * len(tasks))

        def say(system: str, task: str) -> None:
            bar.update(line, advance=1, description=f"{system} on {task}")

        return measure(model, tasks, systems, seed=seed, progress=say)


def _means(table: "Table", metric: str) -> list[dict[str, Any]]:
    from dataclasses import asdict

    gaps = table.differences(metric, _REFERENCE) if _REFERENCE in table.systems else {}
    return [
        {"system": system, **asdict(found)} | ({"minus_backbone": asdict(gaps[system])} if system in gaps else {})
        for system, found in table.intervals(metric).items()
    ]


def _verdict(table: "Table", metric: str) -> str:
    """In words: is the routed model better than the rest, beyond what other examples would change?"""
    if "routed" not in table.systems:
        return ""
    from mixwright.evaluation.scores import LOWER_IS_BETTER
    from mixwright.evaluation.table import BEST_SINGLE

    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    lines: list[str] = []
    for rival in ("backbone", BEST_SINGLE, "merged product"):
        if rival not in table.systems:
            continue
        gap = table.differences(metric, rival)["routed"]
        word = "level with" if not gap.excludes_zero() else "better than" if sign * gap.value > 0 else "worse than"
        lines.append(f"routed is {word} {rival} ({gap.value:+.3f}, 95 % {gap.low:+.3f} .. {gap.high:+.3f})")
    return "\n".join(lines)
