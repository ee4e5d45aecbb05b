"""Presets are recipes: they decode, name every stage, and carry thresholds that the last one checks."""

from pathlib import Path

import pytest

from mixwright.config import decode
from mixwright.methods.manticore.config import ManticoreConfig
from mixwright.methods.manticore.presets import PRESETS
from mixwright.methods.manticore.recipe import stages
from mixwright.recipe import Recipe


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_is_most_of_a_recipe(name: str, tmp_path: Path) -> None:
    rest = {"method": "manticore", "backbones": ["a", "b"], "output_dir": str(tmp_path), "data": {"train": "t.jsonl"}}
    recipe = decode(Recipe, {**rest, **PRESETS[name]})
    config = decode(ManticoreConfig, dict(recipe.config))
    assert [s.name for s in stages(config)] == ["inspect", "align", "search", "tune", "discretise", "evaluate"]
    assert None not in (config.accept_difference, config.accept_discretised, config.accept_cost)
