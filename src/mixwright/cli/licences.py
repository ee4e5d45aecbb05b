"""`licences`: whose models are in a hybrid, what their licences ask, and a check that a build can fail by."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixwright.cli.output import Json, Settings, console, example, print_json

if TYPE_CHECKING:
    from mixwright.composition.ledger import Ledger

_EXAMPLE = (
    "mixwright licences runs/hybrid/tune/composition",
    "left: Apache-2.0 (read in README.md)",
    "right: CC-BY-NC-4.0 (stated)",
    "mixwright licences recipe.yaml --set config.licences.right=CC-BY-NC-4.0 --forbid non-commercial",
)


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("licences", rich_help_panel="Look around", epilog=example(*_EXAMPLE))(licences)


def licences(
    where: Annotated[
        Path, typer.Argument(metavar="COMPOSITION|RECIPE", help="A saved hybrid, or a recipe that names `backbones`.")
    ],
    forbid: Annotated[
        list[str] | None,
        typer.Option("--forbid", metavar="DUTY", help="Fail where a licence asks this, such as non-commercial."),
    ] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Print the licence ledger of a hybrid. Exit code 3 where a licence is unknown, 1 where some do not go together.

    With `--forbid` also 1 where a licence asks something that is not wanted. This is what was found, not legal advice.
    """
    from mixwright.catalog.licence_terms import DUTIES

    unknown = sorted(set(forbid or ()) - set(DUTIES))
    if unknown:
        raise ValueError(f"--forbid {unknown[0]!r}: expected one of {', '.join(DUTIES)}.")
    ledger = _of_folder(where) if where.is_dir() else _of_recipe(where, settings or [])
    unwanted = [duty for duty in ledger.duties if duty in (forbid or ())]
    if as_json:
        print_json({**ledger.plain(), "forbidden": unwanted})
    else:
        console().print(ledger.text().strip(), markup=False)
        for duty in unwanted:
            console().print(f"forbidden: {duty}", markup=False)
    if ledger.conflicts or unwanted:
        raise typer.Exit(1)


def _of_folder(folder: Path) -> "Ledger":
    from mixwright.artifact import stored_at
    from mixwright.composition.ledger import LEDGER, Ledger, read_entries
    from mixwright.errors import CatalogError

    stored = stored_at(folder)
    if not stored.components:
        raise ValueError(f"{folder} stands on one backbone; `mixwright explain` and its card say what it is made of.")
    entries = read_entries(folder)
    for component in stored.components:
        entry = entries.get(component.name)
        if entry is None or entry.component.fingerprint != component.backbone.fingerprint:
            message = f"it does not cover component {component.name!r} of composition.yaml; save the hybrid again."
            raise CatalogError("LICENCE", f"{folder}/{LEDGER}", message)
    return Ledger(tuple(entries[component.name] for component in stored.components))


def _of_recipe(recipe: Path, settings: list[str]) -> "Ledger":
    from pathlib import PurePath

    from mixwright.composition.ledger import Component, open_ledger
    from mixwright.recipe import read_recipe

    plan = read_recipe(recipe, settings)
    sources = plan.sources("several")
    names = plan.config.get("names") or [PurePath(source.path).name for source in sources]
    listed = [
        Component(name=str(name), path=source.path, fingerprint="", revision=source.revision)
        for name, source in zip(names, sources, strict=True)
    ]
    return open_ledger(listed, plan.config.get("licences"))
