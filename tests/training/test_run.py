"""From a recipe to an expert in a catalogue, for each kind of model, and again after a cut."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mixwright.training.fit as fitting
from mixwright import api
from mixwright.backbones.hf import byte_tokenizer
from mixwright.backbones.tiny import tiny_backbone
from mixwright.catalog.store import Catalog
from mixwright.training.checkpoint import Checkpoints
from mixwright.training.run import TrainingReport

FAMILY = {"causal": "llama", "seq2seq": "t5", "encoder": "bert"}
ROWS = {
    "causal": [{"prompt": f"{c}:", "completion": c * 3} for c in "abcdef"],
    "seq2seq": [{"prompt": f"{c}:", "completion": c * 3} for c in "abcdef"],
    "encoder": [{"text": f"{w} {n}", "label": w} for n in range(3) for w in ("rose", "leaf")],
}


def recipe_for(folder: Path, kind: str = "causal", **changes: Any) -> dict[str, Any]:
    if not (folder / "backbone").exists():
        tiny_backbone(FAMILY[kind]).save_pretrained(folder / "backbone")
        byte_tokenizer(kind).save_pretrained(folder / "backbone")
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS[kind])))
    return {
        "backbone": str(folder / "backbone"),
        "catalog": str(folder / "catalog"),
        "output_dir": str(folder / "run"),
        "expert": {"id": "toy", "task": "says it three times", "licence": "MIT"},
        "data": {"train": str(folder / "rows.jsonl"), "validation": str(folder / "rows.jsonl"), "max_length": 32},
        "train": {"batch_size": 2, "checkpoint_every": 2},
        "config": {"rank": 4, "alpha": 4.0, "expert_steps": 6, "gate_steps": 4, "warmup": 0.2},
        **changes,
    }


def train(recipe: dict[str, Any], **options: Any) -> TrainingReport:
    return api.train(recipe, quiet=True, **options)


def test_both_stages_leave_an_expert_with_gates_and_a_card(tmp_path: Path) -> None:
    report = train(recipe_for(tmp_path))
    catalog = Catalog(tmp_path / "catalog")
    expert = catalog.expert("toy")
    assert list(report.stages) == ["expert", "gate"] and expert.gates is not None
    assert len(expert.factors) == 14 == len(expert.gates)
    assert all(factors.scale == 1.0 for factors in expert.factors.values())
    card = catalog.card("toy")
    assert (card.task, card.licence, card.recipe["seed"]) == ("says it three times", "MIT", 0)
    assert card.recipe["stages"]["gate"]["steps"] == 4 and card.recipe["stages"]["expert"]["warmup_steps"] == 1


@pytest.mark.parametrize("kind", ["seq2seq", "encoder"])
def test_other_kinds_of_model_train_from_the_same_recipe(kind: str, tmp_path: Path) -> None:
    report = train(recipe_for(tmp_path, kind))
    assert report.kind == kind and Catalog(tmp_path / "catalog").expert("toy").gates is not None


def test_a_trained_expert_opens_in_peft_with_the_same_logits(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    train(recipe_for(tmp_path), stage="expert")
    backbone = tiny_backbone("llama")
    tokens = torch.arange(4, 20)[None]
    plain = backbone(tokens).logits
    model = api.compose("phatgoose", backbone=backbone, catalog=tmp_path / "catalog", top_k=1)
    with torch.no_grad(), model.only("toy"):
        ours = model(tokens).logits
    (folder,) = (path.parent for path in (tmp_path / "catalog").rglob("adapter_config.json"))
    theirs = peft.PeftModel.from_pretrained(model.remove(), folder)(tokens).logits
    assert (ours - theirs).abs().max() <= 1e-5
    assert (ours - plain).abs().max() > 1e-3  # and it says something else than the backbone


def test_a_stage_at_a_time_is_the_same_as_both(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    train(recipe_for(tmp_path / "a"))
    train(recipe_for(tmp_path / "b"), stage="expert")
    train(recipe_for(tmp_path / "b"), stage="gate")
    files = [Catalog(tmp_path / x / "catalog").card("toy").files for x in "ab"]
    for name in ("adapter_model.safetensors", "gate.safetensors"):
        assert files[0][name] == files[1][name]


@pytest.mark.parametrize("saves", [1, 3, 4])
def test_a_cut_anywhere_resumes_to_the_same_files(saves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    train(recipe_for(tmp_path / "a"))
    done: list[int] = []
    plain = Checkpoints.save

    def cut(self: Checkpoints, snapshot: Any) -> Path:
        path = plain(self, snapshot)
        done.append(1)
        if len(done) == saves:
            raise OSError("the power goes")
        return path

    monkeypatch.setattr(fitting.Checkpoints, "save", cut)
    with pytest.raises(OSError, match="the power goes"):
        train(recipe_for(tmp_path / "b"))
    monkeypatch.undo()
    report = train(recipe_for(tmp_path / "b"), resume=True)
    assert report.skipped == (("expert",) if saves == 4 else ())
    files = [Catalog(tmp_path / x / "catalog").card("toy").files for x in "ab"]
    for name in ("adapter_model.safetensors", "gate.safetensors"):
        assert files[0][name] == files[1][name]
    assert train(recipe_for(tmp_path / "b"), resume=True).skipped == ("expert",)  # once more does no harm


def test_dry_run_checks_and_counts_and_changes_nothing(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    before = sorted(path for path in tmp_path.rglob("*"))
    report = train(recipe, dry_run=True)
    expert, gate = report.plans
    assert (expert.trainable, gate.trainable) == (4 * 2 * (2 * 64 + 2 * 48 + 3 * 80), 12 * 32 + 2 * 48)
    assert expert.sites[0] == "model.layers.0.self_attn.q_proj" and len(expert.sites) == 14
    assert all(size > 0 for size in expert.memory.values()) and report.examples == 6
    assert not report.stages and not (tmp_path / "run").exists()
    assert [path for path in sorted(tmp_path.rglob("*")) if path.is_file()] == [
        path for path in before if path.is_file()
    ]


def test_faults_of_a_recipe_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stage 'gates': expected one of expert, gate"):
        train(recipe_for(tmp_path), stage="gates")
    with pytest.raises(ValueError, match=r"recipe.data.train: missing"):
        train(recipe_for(tmp_path, data={}))
    with pytest.raises(ValueError, match=r"recipe.config.rnak: unknown key; did you mean 'rank'"):
        train(recipe_for(tmp_path, config={"rnak": 3}))
    with pytest.raises(ValueError, match=r"stage gate needs a trained expert; run stage expert first"):
        train(recipe_for(tmp_path), stage="gate")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl:2: no 'completion'"):
        train(recipe_for(tmp_path, data={"train": str(tmp_path / "bad.jsonl")}))


def test_an_expert_that_is_there_is_not_trained_over(tmp_path: Path) -> None:
    train(recipe_for(tmp_path), stage="expert")
    with pytest.raises(ValueError, match="expert toy is in the catalogue .* train only a later stage"):
        train(recipe_for(tmp_path))
    with pytest.raises(ValueError, match="already, from another run; choose another"):
        train(recipe_for(tmp_path, seed=1), resume=True)
