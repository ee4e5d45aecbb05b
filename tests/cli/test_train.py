"""The verb `train`: from a YAML file to an expert, for people and for machines."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mixwright.backbones.hf import byte_tokenizer
from mixwright.backbones.tiny import tiny_backbone
from mixwright.catalog.store import Catalog
from mixwright.cli import build
from mixwright.yaml12 import write_yaml


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    tiny_backbone("llama").save_pretrained(tmp_path / "backbone")
    byte_tokenizer().save_pretrained(tmp_path / "backbone")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"prompt": c, "completion": c * 3}) for c in "abcd"))
    content = {
        "backbone": str(tmp_path / "backbone"),
        "catalog": str(tmp_path / "catalog"),
        "output_dir": str(tmp_path / "run"),
        "expert": "toy",
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 16},
        "train": {"batch_size": 2},
        "config": {"rank": 2, "expert_steps": 3, "gate_steps": 2},
    }
    (tmp_path / "recipe.yaml").write_text(write_yaml(content))
    return tmp_path / "recipe.yaml"


def run(*arguments: object) -> str:
    result = CliRunner().invoke(build(), ["train", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_train_says_what_it_would_do_and_then_does_it(recipe: Path) -> None:
    plan = run(recipe, "--dry-run")
    assert "Nothing was trained" in plan and "14" in plan and "4 examples" in plan
    assert not (recipe.parent / "run").exists()
    done = run(recipe, "--set", "config.gate_steps=3")
    assert "expert toy is in the catalogue" in done and "gate" in done
    assert Catalog(recipe.parent / "catalog").card("toy").has_gates
    assert "done before: expert" in run(recipe, "--set", "config.gate_steps=3", "--resume")


def test_train_for_machines_stage_by_stage(recipe: Path) -> None:
    plan = json.loads(run(recipe, "--dry-run", "--json"))
    assert [stage["name"] for stage in plan["plans"]] == ["expert", "gate"] and plan["kind"] == "causal"
    report = json.loads(run(recipe, "--stage", "expert", "--json"))
    assert report["stages"]["expert"]["steps"] == 3 and report["stages"]["expert"]["loss"] > 0
    assert not Catalog(recipe.parent / "catalog").card("toy").has_gates
    assert list(json.loads(run(recipe, "--stage", "gate", "--json"))["stages"]) == ["gate"]


def test_a_wrong_recipe_is_named(recipe: Path) -> None:
    with pytest.raises(ValueError, match=r"config.rnak: unknown key; did you mean 'rank'"):
        run(recipe, "--set", "config.rnak=3")
    with pytest.raises(ValueError, match=r"stage 'gates': expected one of expert, gate"):
        run(recipe, "--stage", "gates")
