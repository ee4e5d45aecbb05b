"""A task of a task-routed model as a PEFT LoRA and as merged weights: PEFT and our catalogue read them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from mixwright.backbones.hf import byte_tokenizer, load_backbone
from mixwright.backbones.tiny import tiny_backbone
from mixwright.catalog.store import Catalog
from mixwright.composition.exporting import export_lora, export_merged
from mixwright.composition.folding import updates
from mixwright.composition.inputs import example_inputs
from mixwright.composition.model import ComposedModel
from mixwright.errors import CatalogError
from mixwright.methods.base import load
from mixwright.ops.digest import tensor_digest
from mixwright.routers.constant import ConstantRouter
from mixwright.routing import Condition

KINDS = ("lora", "poly", "mhr", "tlora", "tensorpoly-1", "tensorpoly-2", "entangled")
RANK = 4


def task(number: int) -> Condition:
    return Condition(task_ids=torch.tensor([number]))


def output(model: nn.Module, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs, **more)[0]


def assert_equal(found: Tensor, wanted: Tensor, tolerance: float = 1e-6) -> None:
    """Equal as far as the numbers of this dtype can be, measured against the largest of them."""
    assert (found - wanted).abs().max() <= tolerance * max(1.0, wanted.abs().max().item())


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", kind) for kind in KINDS]
    + [(family, kind) for family in ("gpt2", "t5", "bert") for kind in ("mhr", "tensorpoly-2", "entangled")],
)
def test_peft_opens_a_task_with_equal_outputs(family: str, kind: str, by_task: Any, tmp_path: Path) -> None:
    model: ComposedModel = by_task(tiny_backbone(family), kind, rank=RANK)
    inputs = example_inputs(model.backbone) or {}
    exported = export_lora(model, task(1), tmp_path / "law", "law")
    opened = PeftModel.from_pretrained(tiny_backbone(family), tmp_path / "law").eval()
    wanted = output(model, inputs, condition=task(1))
    assert_equal(output(opened, inputs), wanted)
    assert (wanted - output(tiny_backbone(family), inputs)).abs().max() > 1e-2
    if kind not in ("lora", "tlora"):
        assert (wanted - output(model, inputs, condition=task(2))).abs().max() > 1e-3
    assert exported.rank == RANK and exported.sites == len(model.mixtures)


@pytest.mark.parametrize(("family", "kind"), [("llama", "entangled"), ("gpt2", "tensorpoly-1"), ("t5", "mhr")])
def test_the_catalogue_takes_a_task_back(family: str, kind: str, by_task: Any, tmp_path: Path) -> None:
    model: ComposedModel = by_task(tiny_backbone(family), kind)
    inputs = example_inputs(model.backbone) or {}
    export_lora(model, task(2), tmp_path / "law", "law")
    catalog = Catalog(tmp_path / "catalog", tiny_backbone(family))
    card = catalog.add(tmp_path / "law", licence="mit")
    assert card.id == "law" and {site.scale for site in card.sites.values()} == {1 / RANK}
    method = load("phatgoose")
    routed = method.compose(method.config(router="arrow", top_k=1), [tiny_backbone(family)], catalog)
    with routed.only("law"):
        assert_equal(output(routed, inputs), output(model, inputs, condition=task(2)))


def test_servers_need_no_patterns(by_task: Any, tmp_path: Path) -> None:
    model: ComposedModel = by_task(tiny_backbone("llama"), "tensorpoly-2")
    export_lora(model, task(0), tmp_path / "law", "law")
    config = json.loads((tmp_path / "law" / "adapter_config.json").read_text())
    asked = {key: config[key] for key in ("r", "lora_alpha", "bias", "use_rslora", "modules_to_save", "peft_type")}
    assert asked == {
        "r": RANK, "lora_alpha": 1, "bias": "none", "use_rslora": False, "modules_to_save": None, "peft_type": "LORA",
    }  # fmt: skip
    assert config["rank_pattern"] == config["alpha_pattern"] == {} and config["task_type"] == "CAUSAL_LM"
    assert config["target_modules"] == sorted(model.mixtures) and config["base_model_name_or_path"] == "somewhere/tiny"
    tensors = load_file(tmp_path / "law" / "adapter_model.safetensors")
    assert {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in tensors} == set(model.mixtures)
    assert {name.rsplit(".", 2)[1] for name in tensors} == {"lora_A", "lora_B"}
    assert {t.shape[0 if "lora_A" in name else 1] for name, t in tensors.items()} == {RANK}
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    card = (tmp_path / "law" / "README.md").read_text()
    assert "base_model: somewhere/tiny" in card and model.fingerprint in card and "@misc{none}" in card


@pytest.mark.parametrize("kind", KINDS)
def test_the_rank_of_an_update_is_at_most_r(kind: str, by_task: Any) -> None:
    model: ComposedModel = by_task(tiny_backbone("llama").double(), kind, rank=2)
    folded = model.fold(task(1))
    for site, factors in updates(model, task(1)).items():
        change = folded.get_submodule(site).weight - model.mixtures[site].base.weight
        assert torch.linalg.matrix_rank(change, rtol=1e-9) == 2 == factors.down.shape[0]


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", kind) for kind in KINDS] + [(family, "entangled") for family in ("gpt2", "t5", "bert")],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_folded_equals_routed(family: str, kind: str, dtype: torch.dtype, tolerance: float, by_task: Any) -> None:
    model: ComposedModel = by_task(tiny_backbone(family), kind).to(dtype)
    before = tensor_digest(model)
    inputs = example_inputs(model.backbone) or {}
    folded = model.fold(task(1))
    assert_equal(output(folded, inputs), output(model, inputs, condition=task(1)), tolerance)
    assert type(folded) is type(model.backbone) and tensor_digest(model) == before
    with model.under(task(2)):
        assert_equal(output(model.fold(), inputs), output(model, inputs, condition=task(2)), tolerance)


def test_a_model_in_training_is_exported_without_noise(by_task: Any, tmp_path: Path) -> None:
    model: ComposedModel = by_task(tiny_backbone("llama"), noise=True)
    plain = updates(model, task(1))
    model.train()
    for site, factors in updates(model, task(1)).items():
        assert torch.equal(factors.down, plain[site].down) and not factors.down.requires_grad
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_merged_weights_are_a_backbone_like_any_other(family: str, by_task: Any, tmp_path: Path) -> None:
    model: ComposedModel = by_task(tiny_backbone(family), "entangled")
    before = tensor_digest(model)
    inputs = example_inputs(model.backbone) or {}
    export_merged(model, task(1), tmp_path / "merged", byte_tokenizer())
    assert tensor_digest(model) == before
    opened = load_backbone(tmp_path / "merged")
    assert type(opened) is type(model.backbone)
    assert_equal(output(opened, inputs), output(model, inputs, condition=task(1)))
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_a_pool_of_mixed_ranks_is_padded_to_one(pool_of: Any, composed: Any, tmp_path: Path) -> None:
    backbone = tiny_backbone("llama")
    model: ComposedModel = composed(backbone, pool_of(backbone))
    inputs = example_inputs(backbone) or {}
    with model.replaced(dict.fromkeys(model.mixtures, ConstantRouter(torch.tensor([0.1, 0.2, 0.3, 0.4])))):
        wanted = output(model, inputs)
        exported = export_lora(model, Condition(), tmp_path / "mean", "the mean of four")
    assert json.loads((tmp_path / "mean" / "adapter_config.json").read_text())["rank_pattern"] == {}
    opened = PeftModel.from_pretrained(tiny_backbone("llama"), tmp_path / "mean").eval()
    torch.testing.assert_close(output(opened, inputs), wanted, rtol=1e-5, atol=1e-5)
    assert exported.rank == 4 * 4  # four members, each padded to the largest rank


def test_several_tasks_at_once_are_refused(by_task: Any, tmp_path: Path) -> None:
    model: ComposedModel = by_task(tiny_backbone("llama"), "mhr")
    with pytest.raises(ValueError, match=r"decides anew for each token or row \(\(2, 1\) choices\)"):
        export_lora(model, Condition(task_ids=torch.tensor([0, 1])), tmp_path / "law", "law")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused(by_task: Any, tmp_path: Path) -> None:
    model: ComposedModel = by_task(tiny_backbone("llama"))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text.tex").write_text("x")
    for export in (lambda f: export_lora(model, task(0), f, "law"), lambda f: export_merged(model, task(0), f)):
        with pytest.raises(CatalogError, match="^PATH .*in use; give a new or empty folder"):
            export(tmp_path / "thesis")
    assert [p.name for p in tmp_path.rglob("*")] == ["thesis", "text.tex"]


def test_never_half_written(by_task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: ComposedModel = by_task(tiny_backbone("llama"))

    def fail(*_: object) -> None:
        raise OSError("on purpose")

    monkeypatch.setattr("mixwright.files.publish_folder", fail)
    with pytest.raises(OSError, match="on purpose"):
        export_lora(model, task(0), tmp_path / "law", "law")
    assert list(tmp_path.iterdir()) == []
