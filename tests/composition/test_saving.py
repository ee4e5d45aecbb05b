"""A composition on disk: written whole or not at all, read strictly, the same routing to the bit."""

import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixwright import artifact, files
from mixwright.backbones.tiny import tiny_backbone
from mixwright.composition import saving
from mixwright.composition.inputs import example_inputs
from mixwright.composition.model import ComposedModel
from mixwright.errors import CatalogError, IncompatibleExpert
from mixwright.ops.digest import tensor_digest

FAMILIES = ("t5", "gpt2", "gpt_neox", "llama", "qwen3", "gemma", "mistral", "bert", "vit", "opt", "falcon", "albert")


@pytest.fixture
def make(pool_of: Any, composed: Any) -> Callable[..., ComposedModel]:
    def build(family: str = "gpt2", dtype: torch.dtype = torch.float32, path: str = "") -> ComposedModel:
        backbone = tiny_backbone(family).to(dtype)
        model = composed(backbone, pool_of(backbone))
        files = {"adapter_model.safetensors": {"sha256": "0" * 64, "bytes": 10}}
        model.composition = replace(
            model.composition,
            method="phatgoose",
            config={"router": "gates", "top_k": 2},
            backbone={"path": path, "kind": "causal", "revision": None},
            experts=[
                {"id": e, "licence": "MIT", "task": f"task | {e} <b>", "files": files}
                | {"source": {"kind": "hub", "name": f"someone/{e}", "revision": "f" * 40}}
                | {"quality": {"gain": {"value": 0.25, "low": 0.2, "high": 0.3}}}
                for e in model.experts
            ],
            citation="@inproceedings{x}",
        )
        return model

    return build


def run(model: ComposedModel) -> tuple[Tensor, dict[str, list[Tensor]]]:
    inputs = example_inputs(model.backbone, 5)
    assert inputs is not None
    with torch.no_grad(), model.trace() as trace:
        out = model(**inputs)
    return out[0], {s: [t for r in rs for t in (r.weights, r.indices)] for s, rs in trace.items()}


def same(one: tuple[Tensor, Any], two: tuple[Tensor, Any]) -> bool:
    traces = zip(one[1].items(), two[1].items(), strict=True)
    equal = all(s == t and all(torch.equal(a, b) for a, b in zip(x, y, strict=True)) for (s, x), (t, y) in traces)
    return equal and torch.equal(one[0], two[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_save_then_load_gives_the_same_routing(family: str, make: Any, tmp_path: Path) -> None:
    model = make(family)
    model.save_pretrained(tmp_path / "saved")
    loaded = artifact.load(tmp_path / "saved", backbone=tiny_backbone(family))
    assert same(run(model), run(loaded))
    assert loaded.experts == model.experts
    assert loaded.composition.experts[0]["id"] == "a"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_survives(dtype: torch.dtype, make: Any, tmp_path: Path) -> None:
    tiny_backbone("gpt2").to(dtype).save_pretrained(tmp_path / "backbone")
    model = make("gpt2", dtype, path=str(tmp_path / "backbone"))
    model.save_pretrained(tmp_path / "saved")
    loaded = artifact.load(tmp_path / "saved")
    assert loaded.dtype is dtype
    assert same(run(model), run(loaded))
    assert artifact.load(tmp_path / "saved", dtype="float32").dtype is torch.float32


def test_the_folder_has_four_files_that_say_what_they_should(make: Any, tmp_path: Path) -> None:
    make(path="someone/tiny").save_pretrained(tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == [
        "README.md", "added.safetensors", "composition.yaml", "experts.lock.json",
    ]  # fmt: skip
    lock = json.loads((tmp_path / "saved" / "experts.lock.json").read_text())
    assert [e["id"] for e in lock["experts"]] == ["a", "b", "c", "d"]
    assert lock["experts"][0]["source"]["revision"] == "f" * 40
    assert len(lock["experts"][0]["files"]["adapter_model.safetensors"]["sha256"]) == 64
    _, front, body = (tmp_path / "saved" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "mixwright",
        "tags": ["mixwright", "phatgoose", "mixture-of-experts", "lora"],
        "license": "mit",
        "base_model": "someone/tiny",
        "base_model_relation": "adapter",
    }
    assert "| b | task \\| b &lt;b> | MIT | someone/b @ ffffffffffff | 0.250 nats per token (0.200 to 0.300) |" in body
    assert "@inproceedings{x}" in body


def test_what_is_inactive_stays_so_and_can_be_woken(make: Any, tmp_path: Path) -> None:
    model = make()
    everyone = run(model)
    model.set_active(["a", "d"])
    model.save_pretrained(tmp_path / "saved")
    loaded = artifact.load(tmp_path / "saved", backbone=tiny_backbone("gpt2"))
    assert loaded.active == ("a", "d")
    assert same(run(loaded), run(model))
    loaded.set_active(None)
    assert same(run(loaded), everyone)


def test_another_backbone_is_refused_and_left_alone(make: Any, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "saved")
    other = tiny_backbone("gpt2", seed=1)
    before = tensor_digest(other)
    with pytest.raises(IncompatibleExpert, match="^BASE "):
        artifact.load(tmp_path / "saved", backbone=other)
    assert tensor_digest(other) == before
    with pytest.raises(ValueError, match="built in memory"):
        artifact.load(tmp_path / "saved")


def test_saving_again_replaces_a_composition_and_nothing_else(make: Any, tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "saved")
    model.set_active(["a", "b"])
    model.save_pretrained(tmp_path / "saved")
    assert "active:" in (tmp_path / "saved" / "composition.yaml").read_text()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("x")
    with pytest.raises(CatalogError, match="^PATH "):
        model.save_pretrained(tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "saved"]


@pytest.mark.parametrize("step", ["write_new", "card_text", "publish_folder", "sha256_file"])
def test_never_half_written(step: str, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("on purpose")

    monkeypatch.setattr(files if step == "publish_folder" else saving, step, fail)
    with pytest.raises(OSError, match="on purpose"):
        make().save_pretrained(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_saved_files_can_be_read_by_others(make: Any, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "saved")
    assert stat.S_IMODE(os.stat(tmp_path / "saved").st_mode) == 0o755


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors, and the lock with them, as somebody who means harm would."""
    state = load_file(folder / "added.safetensors")
    change(state)
    save_file(state, folder / "added.safetensors")
    lock = json.loads((folder / "experts.lock.json").read_text())
    lock["added"]["added.safetensors"] = {"sha256": saving.sha256_file(folder / "added.safetensors"), "bytes": 0}
    (folder / "experts.lock.json").write_text(json.dumps(lock))


SITE = "transformer.h.0.mlp.c_fc"
TAMPERED: dict[str, tuple[str, Callable[[dict[str, Tensor]], None]]] = {
    "a backbone weight": ("TENSOR", lambda s: s.update({"transformer.wte.weight": torch.zeros(2, 2)})),
    "a base weight": ("TENSOR", lambda s: s.update({f"{SITE}.base.weight": torch.zeros(2, 2)})),
    "no such site": ("TENSOR", lambda s: s.update({"transformer.h.9.mlp.c_fc.experts.up": torch.zeros(2, 2)})),
    "a tensor more": ("TENSOR", lambda s: s.update({f"{SITE}.experts.extra": torch.zeros(2)})),
    "a tensor less": ("TENSOR", lambda s: s.pop(f"{SITE}.experts.up")),
    "no prototypes": ("TENSOR", lambda s: s.pop(f"{SITE}.router.scores.prototypes")),
    "a wrong width": ("SHAPE", lambda s: s.update({f"{SITE}.experts.down": torch.zeros(4, 4, 31)})),
    "a wrong slot": ("SHAPE", lambda s: s.update({f"{SITE}.experts.slot": torch.tensor([0, 1, 2, 9])})),
    "a smaller pool": ("SHAPE", lambda s: s.update({f"{SITE}.router.scores.prototypes": torch.zeros(3, 32),
                                                    f"{SITE}.router.allowed": torch.ones(3).bool()})),
    "not a number": ("VALUE", lambda s: s[f"{SITE}.experts.up"].fill_(float("nan"))),
    "odd dtype": ("DTYPE", lambda s: s.update({f"{SITE}.experts.slot": torch.zeros(4, dtype=torch.int8)})),
}  # fmt: skip


@pytest.mark.parametrize("case", TAMPERED)
def test_tampered_tensors_are_refused(case: str, make: Any, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "saved")
    code, change = TAMPERED[case]
    rewrite(tmp_path / "saved", change)
    backbone = tiny_backbone("gpt2")
    before = tensor_digest(backbone)
    with pytest.raises(CatalogError) as refusal:
        artifact.load(tmp_path / "saved", backbone=backbone)
    assert refusal.value.code == code
    assert tensor_digest(backbone) == before


def test_one_flipped_bit_is_noticed(make: Any, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "added.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CatalogError, match="^HASH"):
        artifact.load(tmp_path / "saved", backbone=tiny_backbone("gpt2"))


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("format: 1", "format: 2", "VERSION"),
        ("format: 1", "format: 1\nsurprise: 1", "CONFIG"),
        ("method: phatgoose", "method: [", "CONFIG"),
        ("pool:", "poool:", "CONFIG"),
        ("top_k: 2", "top_k: 2\n  topk: 2", "CONFIG"),
        ("method: phatgoose", "method: fatgoose", "CONFIG"),
    ],
)
def test_composition_yaml_is_read_strictly(old: str, new: str, code: str, make: Any, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "composition.yaml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(CatalogError) as refusal:
        artifact.load(tmp_path / "saved", backbone=tiny_backbone("gpt2"))
    assert refusal.value.code == code


@pytest.mark.parametrize("file", ["composition.yaml", "added.safetensors", "experts.lock.json"])
def test_a_missing_file_is_named(file: str, make: Any, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / file).unlink()
    with pytest.raises(CatalogError, match=rf"^PATH .*there is no {file}"):
        artifact.load(tmp_path / "saved", backbone=tiny_backbone("gpt2"))


def test_push_to_hub_uploads_the_folder_once(make: Any, hub: Any) -> None:
    assert make().push_to_hub("me/pool", private=True, client=hub) == "https://hub/me/pool"
    assert [name for name, _ in hub.calls] == ["create", "upload"]
    assert hub.calls[0][1] == ("me/pool", {"private": True, "repo_type": "model", "exist_ok": True})
    assert hub.calls[1][1][1] == ["README.md", "added.safetensors", "composition.yaml", "experts.lock.json"]
