"""The self-check passes honest compositions and bites every dishonest one."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mixwright.backbones.tiny import tiny_backbone
from mixwright.composition.model import ComposedModel
from mixwright.composition.selfcheck import self_check
from mixwright.errors import IncompatibleExpert
from mixwright.ops.digest import tensor_digest


@pytest.mark.parametrize(
    "family", ["t5", "gpt2", "gpt_neox", "llama", "qwen3", "gemma", "mistral", "bert", "vit", "opt"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_honest_compositions_pass(family: str, dtype: torch.dtype, pool_of: Any, composed: Any) -> None:
    backbone = tiny_backbone(family)
    pool = pool_of(backbone)
    for sites in pool.values():
        for path, factors in sites.items():  # what the catalogue holds in this dtype
            sites[path] = replace(factors, down=factors.down.to(dtype), up=factors.up.to(dtype))
    model = composed(backbone.to(dtype), pool)
    self_check(model, pool)
    assert model.mixtures


def wrong_scale(model: ComposedModel) -> None:
    next(iter(model.mixtures.values())).experts.scale[1] *= 1.01


def transposed(model: ComposedModel) -> None:
    experts = model.mixtures["transformer.h.1.attn.c_proj"].experts
    experts.down.data[0], experts.up.data[0] = experts.up.data[0].T.clone(), experts.down.data[0].T.clone()


def swapped(model: ComposedModel) -> None:
    for mixture in model.mixtures.values():
        for tensor in (mixture.experts.down.data, mixture.experts.up.data, mixture.experts.scale):
            tensor[[0, 1]] = tensor[[1, 0]]


def wrong_slot(model: ComposedModel) -> None:
    model.mixtures["transformer.h.0.attn.c_proj"].experts.slot[3] = 0


def acts_where_it_has_no_factors(model: ComposedModel) -> None:
    model.mixtures["transformer.h.0.attn.c_proj"].experts.slot[2] = 0


def does_nothing(model: ComposedModel) -> None:
    model.mixtures["transformer.h.0.mlp.c_fc"].experts.up.data[3].zero_()


def not_a_number(model: ComposedModel) -> None:
    model.mixtures["transformer.h.0.mlp.c_fc"].experts.up.data[3, 0, 0] = float("nan")


def other_site(model: ComposedModel) -> None:
    first, second = model.mixtures["transformer.h.0.mlp.c_fc"], model.mixtures["transformer.h.1.mlp.c_fc"]
    first.experts, second.experts = second.experts, first.experts


def passed_by(model: ComposedModel) -> None:
    mixture = model.mixtures["transformer.h.0.mlp.c_fc"]
    model.backbone.transformer.h[0].mlp.c_fc.forward = mixture.base.forward


FAULTS = [
    wrong_scale,
    transposed,
    swapped,
    wrong_slot,
    acts_where_it_has_no_factors,
    does_nothing,
    not_a_number,
    other_site,
    passed_by,
]


@pytest.mark.parametrize("fault", FAULTS)
def test_it_bites(fault: Callable[[ComposedModel], None], pool_of: Any, composed: Any) -> None:
    backbone = tiny_backbone("gpt2")
    before = tensor_digest(backbone)
    pool = pool_of(backbone)
    model = composed(backbone, pool)
    fault(model)
    with pytest.raises(IncompatibleExpert, match='^SELFCHECK expert "[abcd]": ') as refusal:
        self_check(model, pool)
    assert refusal.value.code == "SELFCHECK"
    assert tensor_digest(backbone) == before
    assert type(backbone.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"
    assert all(p.requires_grad for p in backbone.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())


def test_a_fault_that_no_site_shows_is_found_in_the_whole_model(pool_of: Any, composed: Any) -> None:
    backbone = tiny_backbone("gpt2")
    pool = pool_of(backbone)
    model = composed(backbone, pool)
    block = backbone.transformer.h[0].mlp
    plain = block.forward
    block.forward = lambda x: block.c_proj(block.act(block.c_fc.base(x)))  # its owner reads past the mixture
    with pytest.raises(IncompatibleExpert, match="the whole model's output"):
        self_check(model, pool)
    block.forward = plain


def test_training_mode_comes_back(pool_of: Any, composed: Any) -> None:
    backbone = tiny_backbone("gpt2").train()
    pool = pool_of(backbone)
    model = composed(backbone, pool)
    model.train()
    self_check(model, pool)
    assert all(m.training for m in model.modules())


def test_a_large_pool_is_checked_at_its_sites(pool_of: Any, composed: Any) -> None:
    backbone = tiny_backbone("gpt2")
    pool = pool_of(backbone, {f"e{i}": 2 for i in range(20)})
    model = composed(backbone, pool)
    self_check(model, pool)
    model.mixtures["transformer.h.1.mlp.c_proj"].experts.scale[19] *= -1
    with pytest.raises(IncompatibleExpert, match='expert "e19"'):
        self_check(model, pool)
