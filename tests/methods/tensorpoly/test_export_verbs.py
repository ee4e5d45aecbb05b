"""`model.export_lora` and `model.fold_task`: a named task leaves the model, as PEFT's LoRA or as weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import mixwright as mw
from mixwright.backbones.tiny import tiny_backbone
from mixwright.composition.inputs import example_inputs


def trained(**config: Any) -> Any:
    """As after training: every tensor of the experts and routers is random."""
    model = mw.compose("tensorpoly", backbone=tiny_backbone("llama"), **config)
    torch.manual_seed(0)
    std = 0.09 ** (1 / max(2, config.get("order", 2)))  # products of many leaves are small
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name or ".router." in name:
                parameter.normal_(std=std if ".experts." in name else 2.0)
    return model


CASES: dict[str, dict[str, Any]] = {
    "tensorpoly-1, order 4, exact": {"experts": "tensorpoly-1", "order": 4, "factorization": "exact"},
    "tensorpoly-1, order 3, cut": {"experts": "tensorpoly-1", "order": 3},
    "tensorpoly-1, normalised": {"experts": "tensorpoly-1", "norm": "pair"},
    "tensorpoly-2, shared by block": {"experts": "tensorpoly-2", "share": "block"},
    "entangled, shared by all": {"experts": "entangled", "share": "model"},
    "poly": {"experts": "poly", "num_latent": 3},
    "mhr": {"experts": "mhr", "num_latent": 3, "heads": 8},
    "lora": {"experts": "lora"},
    "tlora": {"experts": "tlora", "num_latent": 2},
}


@pytest.mark.parametrize("name", CASES)
def test_a_task_leaves_with_equal_outputs(name: str, tmp_path: Path) -> None:
    model = trained(tasks=("rte", "copa"), rank=3, **CASES[name])
    inputs = example_inputs(model.backbone) or {}
    with torch.no_grad():
        with model.with_task("copa"):
            wanted = model(**inputs).logits
        exported = model.export_lora("copa", tmp_path / "copa")
        opened = PeftModel.from_pretrained(tiny_backbone("llama"), tmp_path / "copa").eval()
        found = {"lora": opened(**inputs).logits, "folded": model.fold_task(1)(**inputs).logits}
        bare = tiny_backbone("llama")(**inputs).logits
    assert exported.rank == 3 and (wanted - bare).abs().max() > 1e-3
    for logits in found.values():
        assert (logits - wanted).abs().max() <= 1e-6 * max(1.0, wanted.abs().max().item())


def test_a_fresh_task_is_the_backbone(tmp_path: Path) -> None:
    model = mw.compose("tensorpoly", backbone=tiny_backbone("llama"), tasks=["rte"], rank=2)
    inputs = example_inputs(model.backbone) or {}
    model.export_lora(0, tmp_path / "rte")
    opened = PeftModel.from_pretrained(tiny_backbone("llama"), tmp_path / "rte").eval()
    with torch.no_grad():
        assert torch.equal(opened(**inputs).logits, tiny_backbone("llama")(**inputs).logits)


def test_a_kind_without_tasks_leaves_as_it_is(tmp_path: Path) -> None:
    model = trained(experts="tlora", rank=2)
    model.export_lora(None, tmp_path / "shared")
    with pytest.raises(ValueError, match="this composition knows no tasks"):
        model.export_lora("rte", tmp_path / "rte")
    assert [p.name for p in tmp_path.iterdir()] == ["shared"]


def test_unknown_tasks_are_named(tmp_path: Path) -> None:
    model = trained(tasks=("rte", "copa"), rank=2)
    with pytest.raises(ValueError, match="no task 'cop' in this model; did you mean 'copa'"):
        model.export_lora("cop", tmp_path / "x")
    with pytest.raises(ValueError, match="no task 2 in this model; it has 2"):
        model.fold_task(2)
    with pytest.raises(ValueError, match="routed by task; say which: rte, copa"):
        model.export_lora(None, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
