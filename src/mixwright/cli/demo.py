"""`demo`: the first run."""

from pathlib import Path
from typing import Annotated

import typer

from mixwright.cli.output import Json, console, example, print_json


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(
        "demo",
        rich_help_panel="Look around",
        epilog=example(
            "mixwright demo", "mixwright demo --folder /tmp/demo --fresh", "mixwright demo --json > demo.json"
        ),
    )(demo)


def demo(
    folder: Annotated[Path, typer.Option("--folder", help="Where the parts and the result are left.")] = Path(
        "mixwright-demo"
    ),
    fresh: Annotated[bool, typer.Option("--fresh", help="Train everything anew.")] = False,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Training steps of the backbone.")] = 220,
    experts: Annotated[int, typer.Option("--experts", min=2, max=8, help="Experts at most.")] = 6,
    as_json: Json = False,
) -> None:
    """Train a small backbone and experts on text that lies on this machine, compose them, show what routing is worth.

    Offline. A second run uses the parts of the first.
    """
    from mixwright.demo.run import demonstrate

    if not as_json:
        demonstrate(folder, console(), steps=steps, experts=experts, fresh=fresh)
        return
    import io

    from rich.console import Console

    found = demonstrate(folder, Console(file=io.StringIO()), steps=steps, experts=experts, fresh=fresh, quiet=True)
    print_json(
        {
            "folder": str(found.folder),
            "corpus": found.corpus,
            "domains": found.domains,
            "scores": found.table.records(),
            "verdict": found.verdict,
            "seconds": found.seconds,
        }
    )
