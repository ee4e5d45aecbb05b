"""The verbs that need no model, and the promise that each verb's help has a worked example."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from mixwright.cli import build
from mixwright.config import decode
from mixwright.methods.phatgoose.config import PhatgooseConfig
from mixwright.recipe import Recipe
from mixwright.yaml12 import parse_yaml


def run(*arguments: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(build(), list(arguments), catch_exceptions=False)
    assert result.exit_code == exit_code, result.output
    return result.output


def commands(app: typer.Typer, before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [(*before, str(command.name)) for command in app.registered_commands]
    for group in app.registered_groups:
        assert group.typer_instance is not None
        found += commands(group.typer_instance, (*before, str(group.name)))
    return found


@pytest.mark.parametrize("words", commands(build()), ids=" ".join)
def test_every_verb_has_a_worked_example(words: tuple[str, ...]) -> None:
    text = run(*words, "--help")
    assert "Example" in text and f"mixwright {' '.join(words)}" in text


def test_help_names_every_verb_with_its_sentence() -> None:
    text = run("--help")
    assert all(words[0] in text for words in commands(build()))


def test_methods_and_cite_for_machines() -> None:
    listed = json.loads(run("methods", "--json"))
    assert "phatgoose" in [method["name"] for method in listed]
    assert json.loads(run("cite", "phatgoose", "--json"))["year"] == 2024


def test_the_printed_schema_is_a_recipe_with_the_defaults() -> None:
    recipe = decode(Recipe, parse_yaml(run("schema", "phatgoose").replace("???", "x")))
    assert recipe == decode(Recipe, {"backbone": "x", "config": recipe.config})
    assert decode(PhatgooseConfig, recipe.config) == PhatgooseConfig()


def test_a_method_of_several_models_asks_for_a_list_of_them() -> None:
    text = run("schema", "manticore")
    recipe = decode(Recipe, parse_yaml(text.replace("???", "x")))
    assert [source.path for source in recipe.backbones] == ["x", "x"] and recipe.backbone is None
    assert "backbone:" not in text


def test_the_json_schema_holds_the_methods_own_settings() -> None:
    schema = json.loads(run("schema", "phatgoose", "--json"))
    assert schema["properties"]["config"]["properties"]["top_k"]["default"] == 2
    assert schema["additionalProperties"] is False and "TrainConfig" in schema["$defs"]


def test_doctor_reports_for_people_and_machines() -> None:
    report = json.loads(run("doctor", "--json"))
    assert report["packages"]["torch"] and report["torch"]["threads"] >= 1 and report["troubles"] == []
    assert "No trouble found." in run("doctor")


def test_doctor_builds_the_kernels_where_it_says_or_says_why_not(compiled, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = Path(json.loads(run("doctor", "--build", "--json"))["built"])
    assert path.is_relative_to(tmp_path) and path.exists()
    path.unlink()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert "the kernels were not built: no C compiler" in run("doctor", "--build", exit_code=1)
