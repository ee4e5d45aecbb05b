"""`explain`: who acted on each token of a text, which latent experts serve which task, or why a hybrid is as it is."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixwright.cli.composition import Backbone, Folder, opened, text_of
from mixwright.cli.explain_hybrid import Asked
from mixwright.cli.output import Json, console, example, print_json

if TYPE_CHECKING:
    from mixwright.composition.model import ComposedModel

_EXAMPLE = (
    "mixwright explain composed --file mixed.txt --output mixed.html",
    "mixwright explain composed --text 'Permission is hereby granted' --without licence",
    "without licence, this passage costs +0.60 nats per token",
    "mixwright explain multitask --output tasks.html --measure",
    "mixwright explain pool --support examples/ --query held-out/ --output pool.html",
    "mixwright explain hybrid --data held-out.jsonl --runs runs/seed-0 --runs runs/seed-1 --output hybrid.html",
)


@dataclass(frozen=True)
class Task:
    """Examples of tasks for a pool of sparse experts, and items to measure on."""

    supports: tuple[str, ...] = ()
    query: str | None = None


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("explain", rich_help_panel="Look at the result", epilog=example(*_EXAMPLE))(explain)


def explain(
    composition: Folder,
    text: Annotated[str | None, typer.Option("--text", help="The text to explain.")] = None,
    file: Annotated[str | None, typer.Option("--file", help="A file that holds it; - is standard input.")] = None,
    target: Annotated[str | None, typer.Option("--target", help="The answer, for encoder-decoders.")] = None,
    without: Annotated[
        str | None, typer.Option("--without", metavar="EXPERT", help="Measure the loss without this expert.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "--out", "-o", help="Write one self-contained HTML page.")
    ] = None,
    terminal: Annotated[bool, typer.Option("--terminal", help="Show it here as well as in the page.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Routed by task: time a training step and an evaluation pass here.")
    ] = False,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="A hybrid: held-out texts to measure on; may stand several times."),
    ] = None,
    runs: Annotated[
        list[Path] | None,
        typer.Option("--runs", help="A hybrid: output_dir of its training; with others' for a band over seeds."),
    ] = None,
    verdicts: Annotated[
        list[Path] | None,
        typer.Option("--verdicts", help="A hybrid: JSON with verdicts of comparisons made elsewhere."),
    ] = None,
    support: Annotated[
        list[str] | None,
        typer.Option(
            "--support", help="A pool of sparse experts: a task's examples by class; may stand several times."
        ),
    ] = None,
    query: Annotated[
        str | None, typer.Option("--query", help="A pool of sparse experts: labelled items to measure --support on.")
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep/--no-sweep", help="A hybrid: measure around the choice too.")] = True,
    limit: Annotated[int, typer.Option("--limit", min=1, help="A hybrid: texts of each file at most.")] = 64,
    max_length: Annotated[int, typer.Option("--max-length", min=2, help="A hybrid: tokens of a row of text.")] = 512,
    backbone: Backbone = None,
    as_json: Json = False,
) -> None:
    """Colour each token of a text by the expert that moved the model most, here or in a page.

    Beside the routing weights stand the contributions, norm(w s B A u) / norm(W u): an expert can have the say and do
    little with it. Without --without, the expert that leads most tokens is left out. A page tells as much as the text
    that it explains: share it as you would share the text.

    A model routed by task needs no text: which latent experts serve which task, layer by layer, how alike the tasks
    are, what each expert really adds, what it costs, and what is wrong.

    A model that retrieves single neurons: usage by layer and head, which neurons fire on which tokens, how sure each
    retrieval was, and what was done where it was not.

    A hybrid of whole models: whether it is better than its best component, what each mixture weight is worth, where it
    helps, how its weights came about, and the ground around them. It is measured on --data, held-out texts.

    A pool of sparse experts: which weights each changes, how alike the experts are, and, for the examples in --support,
    what was chosen, how sure that is, what each expert is worth and what the strength dial does.
    """
    if text is None and file is None and (target is not None or without is not None):
        raise ValueError("--target and --without go with a text; give one of --text TEXT and --file FILE.")
    asked = Asked(
        data=data or (), runs=runs or (), verdicts=verdicts or (), sweeps=sweep, limit=limit, max_length=max_length
    )
    if text is None and file is None:
        task = Task(tuple(support or ()), query)
        _explain_whole(composition, asked, task, output, terminal, measure, backbone, as_json)
        return
    if support or query:
        raise ValueError(
            "--support and --query explain a pool of sparse experts, without a text; leave out one of them."
        )
    if measure:
        raise ValueError("--measure times a model routed by task, without a text; leave out one of them.")
    given = text_of("--text", text, file)
    from mixwright.evaluation.explain import explain as explained
    from mixwright.evaluation.hybrid_rows import mixes_models
    from mixwright.evaluation.neuron_text import retrieves_neurons

    model, tokenizer = opened(composition, backbone)
    if mixes_models(model):
        if target is not None or without is not None or asked.data:
            raise ValueError("a hybrid is explained on one text or on --data; --target and --without are for others.")
        on_text = replace(asked, text=given)
        _explain_hybrid(model, lambda: tokenizer, composition, on_text, output, terminal, as_json)
        return
    _refuse_hybrid_options(asked)
    if retrieves_neurons(model):
        _explain_neurons(model, tokenizer, given, target, without, output, terminal, as_json)
        return
    from mixwright.report.page import explanation_page
    from mixwright.report.terminal import print_explanation

    found = explained(model, tokenizer, given, target=target, without=without)
    page, show = partial(explanation_page, found), partial(print_explanation, found, console())
    _deliver(page, found.to_dict, show, output, terminal, as_json)


def _explain_neurons(
    model: "ComposedModel",
    tokenizer: Any,
    text: str,
    target: str | None,
    without: str | None,
    output: Path | None,
    terminal: bool,
    as_json: bool,
) -> None:
    from mixwright.evaluation.neuron_text import explain_neurons
    from mixwright.report.neuron_page import neuron_page
    from mixwright.report.neuron_terminal import print_neuron_text

    if without is not None:
        raise ValueError("--without names an expert; neurons go by number: take them out with model.ablate(ids).")
    found = explain_neurons(model, tokenizer, text, target=target)
    page, show = partial(neuron_page, found), partial(print_neuron_text, found, console())
    _deliver(page, found.to_dict, show, output, terminal, as_json)


def _explain_whole(
    composition: Path,
    asked: Asked,
    task: Task,
    output: Path | None,
    terminal: bool,
    measure: bool,
    backbone: str | None,
    as_json: bool,
) -> None:
    """Without a text: a hybrid, a pool of sparse experts, or a model routed by task; others need one."""
    from mixwright.cli.composition import loaded, tokenizer_in
    from mixwright.evaluation.hybrid_rows import mixes_models
    from mixwright.evaluation.pool import has_pool

    model = loaded(composition, backbone)
    if has_pool(model):
        _explain_pool(model, asked, task, output, terminal, as_json)
        return
    if task.supports or task.query:
        raise ValueError("--support and --query explain a pool of sparse experts, and this is none.")
    if mixes_models(model):
        if measure:
            raise ValueError("--measure times a model routed by task; a hybrid is measured on --data FILE.")
        _explain_hybrid(
            model, lambda: tokenizer_in(composition, model, backbone), composition, asked, output, terminal, as_json
        )
        return
    _refuse_hybrid_options(asked)
    _explain_tasks(model, composition, output, terminal, measure, as_json)


def _refuse_hybrid_options(asked: Asked) -> None:
    if asked.data or asked.runs or asked.verdicts:
        raise ValueError(
            "--data, --runs and --verdicts explain a hybrid of whole models, and this is none; give --text."
        )


def _explain_hybrid(
    model: "ComposedModel",
    tokenizer: Callable[[], Any],
    composition: Path,
    asked: Asked,
    output: Path | None,
    terminal: bool,
    as_json: bool,
) -> None:
    from mixwright.cli.explain_hybrid import explained
    from mixwright.report.hybrid_page import hybrid_page
    from mixwright.report.hybrid_terminal import print_hybrid

    found = explained(model, tokenizer, composition, asked, quiet=as_json)
    page, show = partial(hybrid_page, found), partial(print_hybrid, found, console())
    _deliver(page, found.to_dict, show, output, terminal, as_json)


def _explain_pool(model: Any, asked: Asked, task: Task, output: Path | None, terminal: bool, as_json: bool) -> None:
    from mixwright.cli.explain_pool import explained_pool
    from mixwright.report.pool_page import pool_page
    from mixwright.report.pool_terminal import print_pool

    pool, episodes = explained_pool(model, task.supports, task.query, asked.limit or 64, asked.max_length)
    content = {**pool.to_dict(), "episodes": [episode.to_dict() for episode in episodes]}
    page, show = partial(pool_page, pool, episodes), partial(print_pool, pool, console(), episodes)
    _deliver(page, lambda: content, show, output, terminal, as_json)


def _explain_tasks(
    model: "ComposedModel", composition: Path, output: Path | None, terminal: bool, measure: bool, as_json: bool
) -> None:
    from dataclasses import asdict

    from mixwright.evaluation.step_time import step_times
    from mixwright.evaluation.task_alarms import task_alarms
    from mixwright.evaluation.task_routing import is_task_routed, task_routing
    from mixwright.report.task_page import task_page
    from mixwright.report.task_terminal import print_task_routing

    if not is_task_routed(model):
        text_of("--text", None, None)
    found = task_routing(model)
    times = step_times(model, len(found.tasks)) if measure else None
    command = f"mixwright explain {composition.name} --measure"
    alarms = [asdict(alarm) for alarm in task_alarms(found)]
    content = {**found.to_dict(), "alarms": alarms, "times": None if times is None else asdict(times)}
    page, show = (
        partial(task_page, found, times, command),
        partial(print_task_routing, found, console(), times, command),
    )
    _deliver(page, lambda: content, show, output, terminal, as_json)


def _deliver(
    page: Callable[[], str],
    content: Callable[[], Any],
    show: Callable[[], None],
    output: Path | None,
    terminal: bool,
    as_json: bool,
) -> None:
    """Write the page where one is asked for; then JSON alone, or the view for a terminal."""
    if output is not None and output.is_dir():
        raise ValueError(f"--output {output}: this is a folder; name a file, such as {output / 'page.html'}.")
    if output is not None:
        from mixwright.files import write_atomic

        write_atomic(output, page().encode("utf-8"))
    if as_json:
        print_json(content())
        return
    if terminal or output is None:
        show()
    if output is not None:
        console().print(f"wrote {output}: open it in a browser", markup=False)
