"""What verbs print: tables for people, JSON for machines; and the options that many verbs share."""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines, and nothing else.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done and stop.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Write over one value of the recipe; may stand several times."),
]


def example(*lines: str) -> str:
    """The epilog of a verb's help: a worked example, each line a command, a file's content or what is printed."""
    plain = (line.replace("[", r"\[") for line in lines)
    return "\n".join(("[dim]Example[/dim]", *(f"  [cyan]{line}[/cyan]" for line in plain)))


def console() -> "Console":
    """Where people read; it knows the terminal's width, and drops colour when the output is a file."""
    from rich.console import Console

    return Console(highlight=False)


def print_json(value: Any) -> None:
    """Print plain data as indented JSON on standard output; NaN and infinities become null."""
    json.dump(_finite(value), sys.stdout, indent=2, ensure_ascii=False, default=str)
    sys.stdout.write("\n")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> None:
    """Print rows under column names; a column of numbers is right-aligned, text is never read as markup."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    lines = [tuple(row) for row in rows]
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for at, column in enumerate(columns):
        numeric = bool(lines) and all(isinstance(line[at], (int, float)) for line in lines)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for line in lines:
        table.add_row(*(Text(_cell(value)) for value in line))
    console().print(table)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
