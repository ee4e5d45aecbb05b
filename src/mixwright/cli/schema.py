"""`schema`: every key that a recipe may have."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from mixwright.cli.output import Json, example, print_json

if TYPE_CHECKING:
    from mixwright.methods.base import Method


def register(app: typer.Typer) -> None:
    """Add the verb."""
    lines = (
        "mixwright schema phatgoose > recipe.yaml",
        "mixwright schema phatgoose --json > recipe.schema.json",
        "mixwright schema manticore --preset cpu-minutes > recipe.yaml",
    )
    app.command("schema", rich_help_panel="Look around", epilog=example(*lines))(schema)


def schema(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The method whose settings stand under `config`.")],
    preset: Annotated[str | None, typer.Option(help="Begin with these settings of the method's.")] = None,
    as_json: Json = False,
) -> None:
    """Print a recipe with every key, its default and its meaning; --json prints the JSON schema that editors read."""
    from mixwright.config import schema as schema_of
    from mixwright.methods.base import load
    from mixwright.recipe import Recipe

    recipe = schema_of(Recipe)
    method = load(name)
    config = schema_of(method.config)
    definitions = {**recipe.pop("$defs", {}), **config.pop("$defs", {})}
    recipe["properties"]["config"] = config
    recipe["properties"]["method"]["default"] = name
    _ask_for_models(recipe, several=method.backbones == "several")
    heading = "every key, with its default. Lines that keep the default can go."
    if preset is not None:
        _begin_with(recipe, definitions, _preset(method, preset))
        heading = f"preset {preset}, and every other key with its default. Models and data are yours to name."
    if as_json:
        print_json({**recipe, "$defs": definitions})
        return
    print(f"# A recipe for {name}: {heading}")
    print("\n".join(_lines(recipe, definitions, indent="")))


def _ask_for_models(recipe: dict[str, Any], *, several: bool) -> None:
    """One backbone, or a list of them, is required: what the method composes."""
    keys = recipe["properties"]
    wanted, other = ("backbones", "backbone") if several else ("backbone", "backbones")
    del keys[other], keys[wanted]["default"]
    recipe.setdefault("required", []).append(wanted)


def _preset(method: "Method", preset: str) -> Mapping[str, Any]:
    there = method.presets()
    if preset not in there:
        raise ValueError(f"--preset {preset}: {method.name} has {', '.join(there) or 'no presets'}.")
    return there[preset]


def _begin_with(node: dict[str, Any], definitions: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Put values in place of defaults, those of objects key by key."""
    for key, value in values.items():
        entry = node["properties"][key]
        inner = _inner(entry, definitions) if isinstance(value, Mapping) else None
        if inner is None:
            entry["default"] = value
        else:
            _begin_with(inner, definitions, cast(Mapping[str, Any], value))


def _lines(node: dict[str, Any], definitions: dict[str, Any], indent: str) -> Iterator[str]:
    """The keys of one object as YAML with comments; a required key without a default stands as ???."""
    for key, entry in node["properties"].items():
        inner = _inner(entry, definitions)
        yield f"{indent}# {_meaning(key, entry, node)}"
        if inner is None:
            yield f"{indent}{key}: {_default(key, entry, node)}"
        elif entry.get("default", {}) is None:
            yield f"{indent}#{key}:"
            yield from (f"{indent}#{line}" for line in _lines(inner, definitions, "  "))
        else:
            yield f"{indent}{key}:"
            yield from _lines(inner, definitions, f"{indent}  ")


def _inner(entry: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any] | None:
    """The object that a key holds, followed through references and unions; None for a plain value."""
    for option in (entry, *entry.get("anyOf", ())):
        found = definitions.get(str(option.get("$ref", "")).rpartition("/")[2], option)
        if found.get("properties"):
            return found
    return None


def _meaning(key: str, entry: dict[str, Any], node: dict[str, Any]) -> str:
    choices = [str(choice) for choice in entry.get("enum", ())]
    words = [entry.get("description", ""), f"One of: {', '.join(choices)}." if choices else ""]
    words.append("Required." if key in node.get("required", ()) else "")
    return " ".join(word for word in words if word)


def _default(key: str, entry: dict[str, Any], node: dict[str, Any]) -> str:
    from mixwright.yaml12 import write_yaml

    if key in node.get("required", ()):
        return "[???, ???]" if entry.get("type") == "array" else "???"
    text = write_yaml({"value": entry.get("default")})
    return text.removeprefix("value: ").strip()
