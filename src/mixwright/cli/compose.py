"""`compose`: the experts of a catalogue and a backbone become one model, written as a folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixwright.cli.output import Json, Settings, console, example, print_json

if TYPE_CHECKING:
    from mixwright.recipe import BackboneConfig, Recipe

_EXAMPLE = (
    "mixwright compose --method phatgoose --backbone my-backbone --catalog my-catalog --output composed",
    "mixwright compose recipe.yaml --output composed --set config.top_k=1",
    "composed: phatgoose, 6 experts (cmake, cpp, json, licence, readme, yaml) at 28 sites",
)


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("compose", rich_help_panel="Make", epilog=example(*_EXAMPLE))(compose)


def compose(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="A YAML file that holds what follows.")
    ] = None,
    method: Annotated[str | None, typer.Option("--method", help="A name that `mixwright methods` prints.")] = None,
    backbone: Annotated[str | None, typer.Option("--backbone", help="A model's folder, or a hub id.")] = None,
    catalog: Annotated[str | None, typer.Option("--catalog", help="The folder of the experts.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The folder to write.")] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Compose a catalogue's active experts into one model, and write it as a folder that the other verbs read.

    Every expert is checked against the backbone and against a second computation of itself before anything is written.
    """
    from mixwright.api import compose as build

    given = {"method": method, "backbone": backbone, "catalog": catalog, "output_dir": output and str(output)}
    plan = _plan(recipe, {key: value for key, value in given.items() if value is not None}, settings or [])
    if plan.output_dir is None:
        raise ValueError("say where the composition goes: --output FOLDER, or output_dir in the recipe.")
    folder = Path(plan.output_dir)
    model = build(plan.method, **_models(plan), catalog=plan.catalog, **plan.config)
    model.save_pretrained(folder)
    facts: dict[str, Any] = {
        "folder": str(folder),
        "method": plan.method,
        "experts": list(model.experts),
        "sites": len(model.mixtures),
        "added_numbers": model.num_added_parameters(),
        "config": dict(model.composition.config),
    }
    if as_json:
        print_json(facts)
        return
    say = console().print
    where = f"at {len(model.mixtures)} sites"
    if model.experts:
        named = ", ".join(model.experts[:12]) + (", ..." if len(model.experts) > 12 else "")
        say(f"{folder}: {plan.method}, {len(model.experts)} experts ({named}) {where}", markup=False)
    else:
        say(f"{folder}: {plan.method}, {model.num_added_parameters():,} numbers {where}", markup=False)
    say(f"Next: mixwright explain {folder} --text '...'   or   mixwright run {folder} --prompt '...'", markup=False)


def _plan(recipe: Path | None, given: dict[str, Any], settings: list[str]) -> "Recipe":
    """The recipe in the file, or an empty one, under the options and the settings.

    A setting that starts with none of a recipe's keys is the method's own: `top_k=2` stands for `config.top_k=2`.
    """
    from dataclasses import fields

    from mixwright.config import decode, override, read_yaml
    from mixwright.methods.base import load
    from mixwright.recipe import Recipe
    from mixwright.training.compositions import with_task_names

    known = {field.name for field in fields(Recipe)}
    dotted = [s if s.split("=")[0].split(".")[0] in known else f"config.{s}" for s in settings]
    base = {} if recipe is None else read_yaml(recipe)
    mapping = override({**base, **given}, dotted)
    missing = [f"--{key}" for key in _needed(str(mapping.get("method") or Recipe.method)) if mapping.get(key) is None]
    if missing:
        raise ValueError(f"nothing to compose: give {' and '.join(missing)}, or a recipe that names them.")
    plan = decode(Recipe, mapping, where=str(recipe) if recipe else "compose")
    return with_task_names(plan, load(plan.method).config)


def _needed(method: str) -> tuple[str, ...]:
    """What a composition is made of: a method that trains whole compositions has experts of its own, no catalogue's.

    Several models have no option of their own: a recipe names them, or `--set backbones=[...]`.
    """
    from mixwright.methods.base import load

    if load(method).backbones == "several":
        return ()
    return ("backbone",) if load(method).trains == "composition" else ("backbone", "catalog")


def _models(plan: "Recipe") -> dict[str, Any]:
    """The model that a method composes, or its several models, as `mixwright.compose` takes them."""
    from mixwright.methods.base import load

    wanted = load(plan.method).backbones
    loaded = [_loaded(source) for source in plan.sources(wanted)]
    return {"backbones": loaded} if wanted == "several" else {"backbone": loaded[0]}


def _loaded(source: "BackboneConfig") -> Any:
    from mixwright.backbones.hf import load_backbone

    return load_backbone(
        source.path,
        revision=source.revision,
        dtype=source.dtype,
        kind=source.kind,
        device_map=source.device_map,
    )
