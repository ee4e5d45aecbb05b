"""Presets are recipes: a verb prints them, they name every stage, and carry thresholds that the last one checks."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mixwright.cli import build
from mixwright.config import decode
from mixwright.methods.base import load
from mixwright.methods.manticore.config import ManticoreConfig
from mixwright.methods.manticore.presets import RECIPES
from mixwright.methods.manticore.recipe import stages
from mixwright.recipe import Recipe, read_recipe

from .pair import findings, recipe_in, record, train

ALL = ["inspect", "align", "search", "tune", "discretise", "evaluate"]
THRESHOLDS = ("accept_difference", "accept_discretised", "accept_cost")


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(build(), list(arguments))


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_preset_is_printed_as_a_recipe(name: str, tmp_path: Path) -> None:
    result = invoke("schema", "manticore", "--preset", name)
    assert result.exit_code == 0, result.output
    path = tmp_path / "recipe.yaml"
    path.write_text(result.stdout)
    recipe = read_recipe(path, ["backbones=[a, b]", "output_dir=out", "data.train=t.jsonl"])
    preset = load("manticore").presets()[name]
    assert recipe == decode(
        Recipe,
        {
            "method": "manticore",
            "backbones": ["a", "b"],
            "output_dir": "out",
            "data": {"train": "t.jsonl"},
            "train": preset["train"],
            "config": recipe.config,
        },
    )
    config = decode(ManticoreConfig, dict(recipe.config))
    assert config == decode(ManticoreConfig, dict(preset["config"]))
    assert [stage.name for stage in stages(config)] == ALL
    assert all(getattr(config, threshold) is not None for threshold in THRESHOLDS)
    schema = json.loads(invoke("schema", "manticore", "--preset", name, "--json").stdout)
    assert schema["properties"]["config"]["properties"]["align_steps"]["default"] == config.align_steps


def test_a_preset_that_is_not_there_is_refused_by_name() -> None:
    for method, there in (("manticore", "cpu-minutes, gpu-hour-125m, gpu-day-400m"), ("peer", "no presets")):
        result = invoke("schema", method, "--preset", "large")
        assert result.exit_code != 0 and f"--preset large: {method} has {there}" in str(
            result.exception or result.output
        )


def test_evaluate_checks_what_the_preset_accepts(tmp_path: Path) -> None:
    """The small one, in fewer steps: each threshold is a gate that compares what it says."""
    fewer = {"align_steps": 2, "search_steps": 2, "tune_steps": 2, "discretise_steps": 2, "choose_every": 1}
    recipe = recipe_in(tmp_path, **{**RECIPES["cpu-minutes"]["config"], **fewer, "learning_rate": 2e-4})
    train(recipe)
    gates = {gate["name"]: gate for gate in record(tmp_path, "evaluate")["gates"]}
    found = findings(tmp_path, "evaluate")
    systems = {one["system"]: one for one in found["systems"]}
    assert set(gates) == {"difference", "discretising", "cost"}
    assert gates["cost"]["bound"] == RECIPES["cpu-minutes"]["config"]["accept_cost"]
    ratio = systems["hybrid"]["flops_per_token"] / systems[found["fallback"]]["flops_per_token"]
    assert gates["cost"]["measured"] == pytest.approx(ratio)
    assert gates["difference"]["measured"] == pytest.approx(found["verdict"]["value"], abs=1e-9)
    assert all(gate["passed"] == (gate["measured"] <= gate["bound"]) for gate in gates.values())
