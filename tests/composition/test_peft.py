"""PEFT is the oracle: one expert at weight 1 gives PEFT's logits, in every honoured form of an adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixwright.backbones.tiny import tiny_backbone
from mixwright.composition.inputs import example_inputs

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"LAST": 5}, "alpha_pattern": {"LAST": 11}},
}
FAMILIES = (
    "t5",
    "gpt2",
    "gpt_neox",
    "llama",
    "qwen3",
    "gemma",
    "mistral",
    "bert",
    "vit",
    "opt",
    "falcon",
    "phi",
    "mamba2",
)


def adapted(family: str, seed: int, form: dict[str, Any]) -> Any:
    from peft import LoraConfig, get_peft_model

    from mixwright.sites import target_sites

    backbone = tiny_backbone(family)
    names = sorted({path.split(".")[-1] for path in target_sites(backbone, ("all-linear",))})
    last = names[-1]
    settings = {k: {last: v["LAST"]} if isinstance(v, dict) else v for k, v in form.items()}
    settings["fan_in_fan_out"] = family == "gpt2"
    torch.manual_seed(seed)
    model = get_peft_model(backbone, LoraConfig(r=3, lora_alpha=7, target_modules=names, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return model.eval()


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize(
    ("family", "form"),
    [(family, "plain") for family in FAMILIES]
    + [(family, form) for family in ("gpt2", "llama", "t5") for form in ("rslora", "patterns")],
)
def test_one_expert_has_pefts_logits(family: str, form: str, tmp_path: Path) -> None:
    from mixwright.catalog.store import Catalog
    from mixwright.methods.base import load

    oracle = adapted(family, 0, FORMS[form])
    other = adapted(family, 1, {})
    for name, model in (("one", oracle), ("two", other)):
        model.save_pretrained(tmp_path / name)
    backbone = tiny_backbone(family)
    catalog = Catalog(tmp_path / "catalog", backbone)
    for name in ("one", "two"):
        catalog.add(tmp_path / name, expert_id=name, licence="mit", confirm_base=True)
    method = load("phatgoose")
    composed = method.compose(method.config(router="arrow"), [backbone], catalog)
    inputs = example_inputs(backbone) or {}
    with composed.only("one"):
        torch.testing.assert_close(output(composed, inputs), output(oracle, inputs), rtol=1e-5, atol=1e-5)
    with composed.only("two"):
        torch.testing.assert_close(output(composed, inputs), output(other, inputs), rtol=1e-5, atol=1e-5)
    assert (output(oracle, inputs) - output(other, inputs)).abs().max() > 1e-2
