"""The verb `train` where a method makes a whole composition: tasks in, folders out, for people and for machines."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mixwright.backbones.hf import byte_tokenizer
from mixwright.backbones.tiny import tiny_backbone
from mixwright.cli import build
from mixwright.errors import CatalogError
from mixwright.yaml12 import write_yaml


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    tiny_backbone("llama").save_pretrained(tmp_path / "backbone")
    byte_tokenizer().save_pretrained(tmp_path / "backbone")
    for name, count in (("twice", 4), ("thrice", 6), ("new", 4)):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"prompt": c, "completion": c * 3}) for c in "abcdef"[:count]]
        for split in ("train", "validation")[: 1 + (name == "thrice")]:
            (tmp_path / name / f"{split}.jsonl").write_text("\n".join(lines))
    content = {
        "method": "tensorpoly",
        "backbone": str(tmp_path / "backbone"),
        "output_dir": str(tmp_path / "run"),
        "data": {"tasks": {name: str(tmp_path / name) for name in ("twice", "thrice")}, "max_length": 16},
        "train": {"batch_size": 2},
        "config": {"rank": 2, "num_latent": 2, "steps": 3, "transfer": "router", "start": "mean", "transfer_steps": 2}
        | {"target_modules": ["q_proj"]},
    }
    (tmp_path / "recipe.yaml").write_text(write_yaml(content))
    return tmp_path / "recipe.yaml"


def run(*arguments: object) -> str:
    result = CliRunner().invoke(build(), ["train", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


def test_train_says_what_it_would_do_and_then_does_it(recipe: Path) -> None:
    plan = run(recipe, "--dry-run")
    assert "router: 8 at rate 0.1" in plan and "tasks: twice (4), thrice (6)" in plan  # 2 sites, 2 tasks, 2 experts
    assert "held out: thrice (6)" in plan and "no checkpoint is chosen by it: twice" in plan
    assert "Nothing was trained" in plan and not (recipe.parent / "run").exists()
    done = run(recipe)
    assert "held-out loss of thrice" in done and "see it with: mixwright explain" in done
    assert (recipe.parent / "run" / "multitask" / "composition" / "composition.yaml").is_file()
    assert "done before: multitask" in run(recipe, "--resume")


def test_train_for_machines_and_the_new_task_afterwards(recipe: Path) -> None:
    report = json.loads(run(recipe, "--json"))
    assert list(report["stages"]) == ["multitask"] and report["composition"].endswith("multitask/composition")
    assert list(report["stages"]["multitask"]["held_out"]) == ["thrice"] and report["tasks"] == {
        "twice": 4,
        "thrice": 6,
    }
    new = ("--set", f"data.new_tasks.new={recipe.parent / 'new'}", "--stage", "transfer")
    assert "transfer trains at most router: 8" in run(recipe, *new, "--dry-run")
    assert "new: trained router (4 numbers) from a mean row on 4 shots" in run(recipe, *new)


def test_a_wrong_recipe_is_named(recipe: Path) -> None:
    for settings, message in (
        (("data.tasks.more=nowhere.jsonl",), r"recipe.data.tasks.more: nowhere.jsonl: no such file"),
        (("data.tasks=3",), r"data.tasks"),
        (("data.temperature=-1",), r"data.temperature: expected greater than 0"),
        (("config.tasks=[twice]",), r"recipe.data.tasks.thrice: config.tasks does not name it"),
        (("composition=nowhere/at/all",), r"nowhere/at/all"),
    ):
        with pytest.raises((ValueError, CatalogError), match=message):
            run(recipe, *(part for setting in settings for part in ("--set", setting)))
    with pytest.raises(ValueError, match=r"stage 'tranfer': expected one of multitask, transfer"):
        run(recipe, "--stage", "tranfer")
    twice = recipe.read_text().replace("thrice:", "twice:")
    (recipe.parent / "twice.yaml").write_text(twice)
    with pytest.raises(ValueError, match="key 'twice' stands twice"):
        run(recipe.parent / "twice.yaml")
