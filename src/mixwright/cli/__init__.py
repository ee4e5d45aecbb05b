"""The command `mixwright`: one file per group of verbs, found by listing this folder; no torch before a verb runs.

A file that offers verbs has `register(app: typer.Typer) -> None`. Nothing else is edited to add one.
"""

import inspect
import pkgutil
from importlib import import_module
from typing import Annotated

import typer

from mixwright.cli.edge import run_at_edge

# The order in which help shows the verbs; one that is not named here follows.
_ORDER = (
    *("demo", "train", "experts", "compose", "eval", "explain", "report", "run"),
    *("methods", "cite", "schema", "doctor"),
)


def build() -> typer.Typer:
    """The app with the verbs of every file in this folder."""
    app = typer.Typer(
        name="mixwright",
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        add_completion=False,
        epilog="Start with [cyan]mixwright demo[/cyan]. Worked examples: [cyan]mixwright VERB --help[/cyan]",
    )
    app.callback()(_root)
    for module in pkgutil.iter_modules(__path__):
        register = getattr(import_module(f"{__name__}.{module.name}"), "register", None)
        if register is not None:
            register(app)
    _unwrap_help(app)
    app.registered_commands.sort(key=lambda command: _place(command.name))
    app.registered_groups.sort(key=lambda group: _place(group.name))
    return app


def main() -> None:
    """Run the command line and leave with its exit code: 0 done, 1 other, 2 bad input, 3 refused, 130 interrupted."""
    run_at_edge(build())


def _show_version(wanted: bool) -> None:
    if wanted:
        from mixwright import __version__

        print(__version__)
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
]


def _root(version: Version = False) -> None:
    """Experts trained apart, composed into one model that chooses among them for every token and layer."""
    del version


def _unwrap_help(app: typer.Typer) -> None:
    """Let the terminal wrap each paragraph of a docstring; the lines of the source are not those of the screen."""
    for command in app.registered_commands:
        text = inspect.getdoc(command.callback) if command.callback is not None else None
        if command.help is None and text:
            command.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    for group in app.registered_groups:
        if group.typer_instance is not None:
            _unwrap_help(group.typer_instance)


def _place(name: str | None) -> tuple[int, str]:
    return (_ORDER.index(name) if name in _ORDER else len(_ORDER), str(name))
