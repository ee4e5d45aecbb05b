"""`explain`: which experts or neurons acted on each token of a text, or which latent experts serve which task."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixwright.cli.composition import Backbone, Folder, opened, text_of
from mixwright.cli.output import Json, console, example, print_json

if TYPE_CHECKING:
    from mixwright.composition.model import ComposedModel

_EXAMPLE = (
    "mixwright explain composed --file mixed.txt --output mixed.html",
    "mixwright explain composed --text 'Permission is hereby granted' --without licence",
    "without licence, this passage costs +0.60 nats per token",
    "mixwright explain multitask --output tasks.html --measure",
)


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
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write one self-contained HTML page.")] = None,
    terminal: Annotated[bool, typer.Option("--terminal", help="Show it here as well as in the page.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Routed by task: time a training step and an evaluation pass here.")
    ] = False,
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
    """
    if text is None and file is None:
        if target is not None or without is not None:
            raise ValueError("--target and --without go with a text; give one of --text TEXT and --file FILE.")
        _explain_tasks(composition, output, terminal, measure, backbone, as_json)
        return
    if measure:
        raise ValueError("--measure times a model routed by task, without a text; leave out one of them.")
    given = text_of("--text", text, file)
    from mixwright.evaluation.explain import explain as explained
    from mixwright.evaluation.neuron_text import retrieves_neurons

    model, tokenizer = opened(composition, backbone)
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


def _explain_tasks(
    composition: Path, output: Path | None, terminal: bool, measure: bool, backbone: str | None, as_json: bool
) -> None:
    from dataclasses import asdict

    from mixwright.api import load
    from mixwright.evaluation.step_time import step_times
    from mixwright.evaluation.task_alarms import task_alarms
    from mixwright.evaluation.task_routing import is_task_routed, task_routing
    from mixwright.report.task_page import task_page
    from mixwright.report.task_terminal import print_task_routing

    model = load(composition, backbone=backbone)
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
