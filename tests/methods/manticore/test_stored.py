"""Hybrids on a disk: components named or kept, their licences beside them, whole or not at all, read strictly."""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import mixwright as mw
from mixwright.backbones.hf import byte_tokenizer, load_tokenizer
from mixwright.backbones.tiny import tiny_backbone
from mixwright.cli import build
from mixwright.composition import components, ledger, saving
from mixwright.errors import CatalogError, IncompatibleExpert
from mixwright.files import sha256_file
from mixwright.methods.manticore.model import HybridModel
from mixwright.ops.digest import tensor_digest

IDS = torch.tensor([[5, 9, 33, 7, 120, 8]])
ROWS = ((0.3, 0.7), (0.6, 0.4))


@dataclass
class Pair:
    left: Path
    right: Path

    def compose(self, **config: Any) -> HybridModel:
        return mw.compose("manticore", backbones=[self.left, self.right], num_blocks=2, mixture_weights=ROWS, **config)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    place = tmp_path_factory.mktemp("pretrained")
    for name, family, licence, tied in (("left", "gpt_neox", "apache-2.0", False), ("right", "qwen3", "mit", True)):
        tiny_backbone(family, tie_word_embeddings=tied).save_pretrained(place / name)  # type: ignore[operator]
        byte_tokenizer().save_pretrained(place / name)
        (place / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    return Pair(place / "left", place / "right")


@pytest.fixture
def pair(pristine: Pair, tmp_path: Path) -> Pair:
    for path in (pristine.left, pristine.right):
        shutil.copytree(path, tmp_path / path.name)
    return Pair(tmp_path / "left", tmp_path / "right")


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def trained(model: HybridModel, component: int) -> HybridModel:
    """Change one component as training would, in one weight too small for a rounded fingerprint to see."""
    with torch.no_grad():
        next(model.components[component].parameters()).view(-1)[1] += 1e-6
    return model


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_untrained_components_are_named_and_not_copied(pair: Pair, tmp_path: Path) -> None:
    model = pair.compose()
    model.save_pretrained(tmp_path / "saved")
    loaded = mw.load(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model))
    assert isinstance(loaded, HybridModel)
    assert torch.equal(loaded.mixture_weights, model.mixture_weights)
    assert loaded.experts == ("left", "right")
    assert files(tmp_path / "saved") == [
        "NOTICE", "README.md", "added.safetensors", "composition.yaml", "experts.lock.json", "ledger.json",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    stored = yaml.safe_load((tmp_path / "saved" / "composition.yaml").read_text())["components"]
    assert [(one["name"], one["folder"], one["backbone"]["path"]) for one in stored] == [
        ("left", None, str(pair.left)),
        ("right", None, str(pair.right)),
    ]


@pytest.mark.parametrize("which", [0, 1])
def test_a_trained_component_is_kept_tied_head_and_all(which: int, pair: Pair, tmp_path: Path) -> None:
    model = trained(pair.compose(), which)
    model.save_pretrained(tmp_path / "saved")
    shutil.rmtree((pair.left, pair.right)[which])
    loaded = mw.load(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model))
    assert tensor_digest(loaded.backbone) == tensor_digest(model.backbone)
    kept = tmp_path / "saved" / "components" / str(which)
    alone = AutoModelForCausalLM.from_pretrained(kept)
    assert torch.equal(logits(alone), logits(model.components[which]))
    if which == 1:
        head = loaded.components[1].get_output_embeddings()
        assert head.weight is loaded.components[1].get_input_embeddings().weight
        assert "lm_head.weight" not in load_file(kept / "model.safetensors")
    assert not (tmp_path / "saved" / "components" / str(1 - which)).exists()
    loaded.save_pretrained(tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "saved")
    assert torch.equal(logits(mw.load(tmp_path / "again")), logits(model))


def test_half_precision_is_no_training(pair: Pair, tmp_path: Path) -> None:
    model = pair.compose()
    model.mixture_weights = ((1.0, 0.0), (0.0, 1.0))
    model.save_pretrained(tmp_path / "saved")
    half = mw.load(tmp_path / "saved", dtype="bfloat16")
    half.save_pretrained(tmp_path / "half")
    assert not (tmp_path / "half" / "components").exists()
    assert torch.equal(logits(mw.load(tmp_path / "half")), logits(half))


def test_components_that_were_built_in_memory_are_given_again(tmp_path: Path) -> None:
    built = [tiny_backbone("gpt2"), tiny_backbone("mamba2")]
    model = mw.compose("manticore", backbones=built, licences={"gpt2": "MIT", "mamba2": "Apache-2.0"})
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"'gpt2' was built in memory; pass it: load\(folder, backbone=\[\.\.\.\]\)"):
        mw.load(tmp_path / "saved")
    again = mw.load(tmp_path / "saved", backbone=[tiny_backbone("gpt2"), tiny_backbone("mamba2")])
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match="made of 2 models"):
        mw.load(tmp_path / "saved", backbone=tiny_backbone("gpt2"))
    with pytest.raises(ValueError, match="made of 2 models"):
        mw.load(tmp_path / "saved", backbone=built[:1])
    with pytest.raises(IncompatibleExpert, match="^BASE .*component 'mamba2'"):
        mw.load(tmp_path / "saved", backbone=[tiny_backbone("gpt2"), tiny_backbone("mamba2", seed=1)])


def test_one_component_can_be_given_and_the_other_found(pair: Pair, tmp_path: Path) -> None:
    model = pair.compose()
    model.save_pretrained(tmp_path / "saved")
    pair.left.rename(tmp_path / "moved")
    with pytest.raises(CatalogError, match="^PATH "):
        mw.load(tmp_path / "saved")
    loaded = mw.load(tmp_path / "saved", backbone=[tmp_path / "moved", None])
    assert torch.equal(logits(loaded), logits(model))


def test_a_single_backbone_takes_no_list(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    model = mw.compose("peer", backbone=tiny_backbone("gpt2"), top_k=2, num_experts=16, heads=1, sites="*.h.0.mlp")
    model.save_pretrained(tmp_path / "saved")
    assert "components" not in (tmp_path / "saved" / "composition.yaml").read_text()
    with pytest.raises(ValueError, match="stands on one model"):
        mw.load(tmp_path / "saved", backbone=[tiny_backbone("gpt2")])


def test_a_component_without_a_licence_is_not_saved(pair: Pair, tmp_path: Path) -> None:
    (pair.right / "README.md").unlink()
    model = pair.compose()
    assert logits(model).shape[-1] == 264
    for act in (lambda: model.save_pretrained(tmp_path / "saved"), lambda: model.push_to_hub("me/x"), model.ledger):
        with pytest.raises(CatalogError, match='^LICENCE licences: component "right": nothing says') as refusal:
            act()
        assert 'licences={"right": ' in str(refusal.value)
    assert not (tmp_path / "saved").exists()
    pair.compose(licences={"right": "cc-by-nc-4.0"}).save_pretrained(tmp_path / "saved")
    listed = json.loads((tmp_path / "saved" / "ledger.json").read_text())
    assert listed["components"][1]["claim"]["source"] == "stated"
    loaded = mw.load(tmp_path / "saved")
    assert loaded.composition.config["licences"] == {"right": "cc-by-nc-4.0"}


def test_the_card_lists_every_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(path: str, *_: object, **__: object) -> Path:
        raise CatalogError("PATH", path, "the hub did not give it")

    monkeypatch.setattr(ledger, "fetch", unreachable)
    monkeypatch.setattr(components, "load_tokenizer", unreachable)
    built = [tiny_backbone("gpt2"), tiny_backbone("mamba2")]
    for backbone, path in zip(built, ("someone/gpt", "other/mamba")):
        backbone.config._name_or_path = path  # type: ignore[union-attr]
        backbone.config._commit_hash = "f" * 40  # type: ignore[union-attr]
    model = mw.compose("manticore", backbones=built, licences={"gpt": "MIT", "mamba": "gpl-2.0"})
    model.save_pretrained(tmp_path / "saved")
    _, front, body = (tmp_path / "saved" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "mixwright",
        "tags": ["mixwright", "manticore", "hybrid", "merge"],
        "license": "other",
        "license_name": "MIT AND GPL-2.0-only",
        "license_link": "ledger.json",
        "base_model": ["someone/gpt", "other/mamba"],
        "base_model_relation": "merge",
    }
    assert (
        "| mamba | Mamba2ForCausalLM | other/mamba @ ffffffffffff | as pretrained | embedding, blocks.0, head |" in body
    )
    assert "share-alike" in body
    assert "@misc{roberts2024pretrained" in body
    notice = (tmp_path / "saved" / "NOTICE").read_text()
    assert "mamba: Mamba2ForCausalLM, other/mamba at " + "f" * 40 in notice


def test_the_tokenizer_lies_beside(pair: Pair, tmp_path: Path) -> None:
    pair.compose().save_pretrained(tmp_path / "saved")
    text = "Grüße, 12!"
    tokens = byte_tokenizer()(text).input_ids
    assert load_tokenizer(tmp_path / "saved")(text).input_ids == tokens
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(text).input_ids == tokens


@pytest.mark.parametrize("step", ["write_new", "components_card", "write_component", "write_tokenizer", "sha256_file"])
def test_never_half_written(step: str, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("on purpose")

    model = trained(pair.compose(), 0)
    monkeypatch.setattr(saving, step, fail)
    with pytest.raises(OSError, match="on purpose"):
        model.save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["left", "right"]


KEPT = "components/0/model.safetensors"


def lock_again(saved: Path) -> None:
    """Write the lock anew, as somebody who means harm would."""
    lock = json.loads((saved / "experts.lock.json").read_text())
    for file in lock["components"]:
        lock["components"][file]["sha256"] = sha256_file(saved / file)
    lock["added"]["added.safetensors"]["sha256"] = sha256_file(saved / "added.safetensors")
    (saved / "experts.lock.json").write_text(json.dumps(lock))


def change(file: str, act: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def tamper(saved: Path) -> None:
        state = load_file(saved / file)
        act(state)
        save_file(state, saved / file, metadata={"format": "pt"})
        lock_again(saved)

    return tamper


def edit(file: str, old: str, new: str) -> Callable[[Path], None]:
    def tamper(saved: Path) -> None:
        text = (saved / file).read_text()
        assert old in text
        (saved / file).write_text(text.replace(old, new))
        if file.startswith("components"):
            lock_again(saved)

    return tamper


def flip(file: str) -> Callable[[Path], None]:
    def tamper(saved: Path) -> None:
        data = bytearray((saved / file).read_bytes())
        data[-1] ^= 1
        (saved / file).write_bytes(data)

    return tamper


NORM = "gpt_neox.final_layer_norm.weight"
TAMPERED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a flipped bit": ("HASH", flip(KEPT)),
    "a changed config": ("HASH", flip("components/0/config.json")),
    "weights gone": ("PATH", lambda saved: (saved / KEPT).unlink()),
    "config gone": ("PATH", lambda saved: (saved / "components/0/config.json").unlink()),
    "folder gone": ("PATH", lambda saved: shutil.rmtree(saved / "components")),
    "a file more": ("PATH", lambda saved: (saved / "components/0/pytorch_model.bin").write_text("x")),
    "other weights, lock and all": ("BASE", change(KEPT, lambda s: s[NORM].add_(1))),
    "not a number": ("VALUE", change(KEPT, lambda s: s[NORM].fill_(float("nan")))),
    "a tensor less": ("INCOMPLETE", change(KEPT, lambda s: s.pop(NORM))),
    "a wrong shape": ("SHAPE", change(KEPT, lambda s: s.update({NORM: torch.ones(31)}))),
    "no model": ("CONFIG", edit("components/0/config.json", '"gpt_neox"', '"made_up"')),
    "another place": ("PATH", edit("composition.yaml", "folder: components/0", "folder: components/1")),
    "a place outside": ("PATH", edit("composition.yaml", "folder: components/0", "folder: ../left")),
    "another name": ("CONFIG", edit("composition.yaml", "name: left", "name: lift")),
    "a lock without components": ("CONFIG", edit("experts.lock.json", '"components": {', '"component": {')),
    "a projector less": ("TENSOR", change("added.safetensors", lambda s: s.pop("blocks.0.experts.enter.0.bias"))),
    "a slot too many": ("TENSOR", change("added.safetensors", lambda s: s.update({"blocks.7.router.logits": IDS}))),
    "a wrong row": ("SHAPE", change("added.safetensors", lambda s: s.update({"head.router.logits": torch.zeros(3)}))),
    "a changed licence": ("LICENCE", edit("ledger.json", "Apache-2.0", "Freebie")),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_tampered_folder_is_refused(case: str, pair: Pair, tmp_path: Path) -> None:
    trained(pair.compose(), 0).save_pretrained(tmp_path / "saved")
    code, tamper = TAMPERED[case]
    tamper(tmp_path / "saved")
    with pytest.raises(CatalogError) as refusal:
        mw.load(tmp_path / "saved")
    assert refusal.value.code == code, str(refusal.value)


def test_mangled_folders_end_in_a_refusal_or_the_same_model(pair: Pair, tmp_path: Path) -> None:
    model = trained(pair.compose(), 0)
    model.save_pretrained(tmp_path / "saved")
    wanted, draw = logits(model), random.Random(0)
    names = [name for name in files(tmp_path / "saved") if name not in ("README.md", "NOTICE")]
    for _ in range(40):
        file = tmp_path / "saved" / draw.choice(names)
        data = file.read_bytes()
        mangled = bytearray(data[: draw.randrange(len(data))] if draw.random() < 0.3 else data)
        for _ in range(draw.randrange(1, 4)):
            if mangled:
                mangled[draw.randrange(len(mangled))] = draw.randrange(256)
        file.write_bytes(mangled)
        try:
            loaded = mw.load(tmp_path / "saved")
        except CatalogError as refusal:
            assert len(refusal.code) > 2
        else:
            assert torch.equal(logits(loaded), wanted), file.name
        file.write_bytes(data)


def test_push_to_hub_uploads_everything_once(pair: Pair, hub: Any) -> None:
    model = trained(pair.compose(), 0)
    assert model.push_to_hub("me/hybrid", client=hub) == "https://hub/me/hybrid"
    assert [name for name, _ in hub.calls] == ["create", "upload"]
    assert {"components", "ledger.json", "NOTICE", "README.md"} <= set(hub.calls[1][1][1])


def test_the_verb_checks_a_saved_hybrid(pair: Pair, tmp_path: Path) -> None:
    pair.compose().save_pretrained(tmp_path / "saved")
    check = ["licences", str(tmp_path / "saved")]
    result = CliRunner().invoke(build(), check, catch_exceptions=False)
    assert (result.exit_code, "together: Apache-2.0 AND MIT" in result.output) == (0, True)
    stored = tmp_path / "saved" / "composition.yaml"
    stored.write_text(stored.read_text().replace("name: left", "name: lift"))
    with pytest.raises(CatalogError, match="^LICENCE .*does not cover component 'lift'"):
        CliRunner().invoke(build(), check, catch_exceptions=False)


def test_saved_files_can_be_read_by_others(pair: Pair, tmp_path: Path) -> None:
    trained(pair.compose(), 0).save_pretrained(tmp_path / "saved")
    for path in (tmp_path / "saved").rglob("*"):
        assert os.stat(path).st_mode & 0o444 == 0o444, path
