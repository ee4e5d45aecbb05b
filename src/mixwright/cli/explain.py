"""`explain`: which experts acted on each token of a text."""

from pathlib import Path
from typing import Annotated

import typer

from mixwright.cli.composition import Backbone, Folder, Task, opened, text_of
from mixwright.cli.output import Json, console, example, print_json

_EXAMPLE = (
    "mixwright explain composed --file mixed.txt --output mixed.html",
    "mixwright explain composed --text 'Permission is hereby granted' --without licence",
    "without licence, this passage costs +0.60 nats per token",
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
    task: Task = None,
    backbone: Backbone = None,
    as_json: Json = False,
) -> None:
    """Colour each token of a text by the expert that moved the model most, here or in a page.

    Beside the routing weights stand the contributions, norm(w s B A u) / norm(W u): an expert can have the say and do
    little with it. Without --without, the expert that leads most tokens is left out. A page tells as much as the text
    that it explains: share it as you would share the text.
    """
    given = text_of("--text", text, file)
    from mixwright.composition.by_task import of_task
    from mixwright.evaluation.explain import explain as explained

    model, tokenizer = opened(composition, backbone)
    with model.under(of_task(model, task)):
        found = explained(model, tokenizer, given, target=target, without=without)
    if output is not None:
        from mixwright.files import write_atomic
        from mixwright.report.page import explanation_page

        write_atomic(output, explanation_page(found).encode("utf-8"))
    if as_json:
        print_json(found.to_dict())
        return
    if terminal or output is None:
        from mixwright.report.terminal import print_explanation

        print_explanation(found, console())
    if output is not None:
        console().print(f"wrote {output}: open it in a browser", markup=False)
