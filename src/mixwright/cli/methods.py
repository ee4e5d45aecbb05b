"""`methods` and `cite`: which methods there are, and the papers behind them."""

from typing import Annotated

import typer

from mixwright.cli.output import Json, example, print_json, print_table

PANEL = "Look around"


def register(app: typer.Typer) -> None:
    """Add both verbs."""
    app.command("methods", rich_help_panel=PANEL, epilog=example("mixwright methods"))(list_methods)
    app.command("cite", rich_help_panel=PANEL, epilog=example("mixwright cite phatgoose >> refs.bib"))(cite)


def list_methods(as_json: Json = False) -> None:
    """List the methods at hand, with what each does and the paper it follows."""
    from mixwright.methods.base import load, names

    cards = [load(name) for name in names()]
    if as_json:
        print_json([{"name": card.name, "summary": card.summary, "arxiv": card.paper.arxiv} for card in cards])
        return
    rows = [(card.name, card.summary, f"{card.paper.year}, arXiv {card.paper.arxiv}") for card in cards]
    print_table(("method", "what it does", "paper"), rows)


def cite(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name that `mixwright methods` prints.")],
    as_json: Json = False,
) -> None:
    """Print the BibTeX entry of the paper behind a method."""
    from dataclasses import asdict

    from mixwright.methods.base import load

    paper = load(name).paper
    if as_json:
        print_json(asdict(paper))
        return
    print(paper.bibtex)
