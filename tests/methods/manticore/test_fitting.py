"""Projectors fitted by least squares: nearer to the components' ensemble than identity, on tokens not seen before."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

import mixwright as mw
from mixwright.methods.manticore.aligning import Align
from mixwright.methods.manticore.config import ManticoreConfig
from mixwright.methods.manticore.fitting import fit_projectors
from mixwright.methods.manticore.model import HybridModel

VOCAB, SHARE = 40, 0.4


def components() -> list[nn.Module]:
    torch.manual_seed(0)
    neox = GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.2,
    )  # fmt: skip
    llama = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.2,
    )  # fmt: skip
    return [GPTNeoXForCausalLM(neox).eval(), LlamaForCausalLM(llama).eval()]


class Supply:
    """Random tokens, of which the first two of each row are padding."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def batch(self, index: int) -> Any:
        self.asked.append(index)
        ids = torch.randint(0, VOCAB, (4, 18), generator=torch.Generator().manual_seed(index))
        mask = torch.ones_like(ids)
        mask[:, :2] = 0
        made = SimpleNamespace(inputs={"input_ids": ids, "attention_mask": mask})
        made.to = lambda device: made
        return made


UNSEEN = torch.randint(0, VOCAB, (8, 16), generator=torch.Generator().manual_seed(10**6))


def hybrid(kind: str, num_blocks: int, **settings: Any) -> HybridModel:
    rows = [[SHARE, 1 - SHARE]] * num_blocks
    made: Any = mw.compose(
        "manticore", backbones=components(), num_blocks=num_blocks, projectors=kind,
        **{"mixture_weights": rows, **settings},
    )  # fmt: skip
    return made.eval()


@torch.no_grad()
def ensemble() -> Tensor:
    first, second = (component(UNSEEN).logits for component in components())
    return SHARE * first + (1 - SHARE) * second


@torch.no_grad()
def loss(model: HybridModel) -> float:
    """Cross-entropy to what the ensemble of the components predicts, and its own entropy is the least of it."""
    wanted = ensemble().softmax(-1).flatten(0, 1)
    return float(cross_entropy(model(UNSEEN).logits.flatten(0, 1), wanted) - cross_entropy(wanted.log(), wanted))


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_zero_shot_it_loses_much_less_than_identity_and_the_papers_start(num_blocks: int) -> None:
    fitted = hybrid("least_squares", num_blocks)
    assert loss(fitted) == loss(hybrid("identity", num_blocks))  # before
    missed = fit_projectors(fitted, Supply(), tokens=2048)
    assert len(missed) == 4 * num_blocks
    assert all(after < 0.9 * before for before, after in missed.values())
    others = [loss(hybrid(kind, num_blocks)) for kind in ("identity", "linear")]
    assert loss(fitted) < 0.75 * min(others)


def test_components_alone_and_the_weights_are_as_before() -> None:
    model, (first, _) = hybrid("least_squares", 2), components()
    before = [model.mixture_weights, model.embedding_weights, model.head_weights]
    fit_projectors(model, Supply(), tokens=256)
    after = [model.mixture_weights, model.embedding_weights, model.head_weights]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    with torch.no_grad(), model.only(model.experts[0]):
        assert torch.equal(model(UNSEEN).logits, first(UNSEEN).logits)


def test_it_stops_at_its_tokens_and_padding_is_none() -> None:
    supply = Supply()
    fit_projectors(hybrid("least_squares", 1), supply, tokens=130)
    assert supply.asked == [0, 1, 2]  # 64 real tokens each


def test_a_component_that_acts_alone_keeps_its_projectors() -> None:
    model = hybrid("least_squares", 2, mixture_weights=[[1.0, 0.0], [0.5, 0.5]])
    missed = fit_projectors(model, Supply(), tokens=128)
    assert {name.split(".")[1] for name in missed} == {"1"}
    enter = model.mixtures["blocks.0"].experts.enter[0]
    assert torch.equal(enter.weight, torch.eye(24)) and enter.bias.eq(0).all()


def test_a_strong_ridge_is_identity() -> None:
    model = hybrid("least_squares", 1)
    fit_projectors(model, Supply(), tokens=128, strength=1e9)
    torch.testing.assert_close(model.mixtures["blocks.0"].experts.enter[1].weight, torch.eye(16, 24))


def test_projectors_that_are_not_affine_are_refused() -> None:
    with pytest.raises(ValueError, match="blocks.0.enter.0 is Sequential: least squares fits affine projectors"):
        fit_projectors(hybrid("mlp", 1), Supply(), tokens=64)


@pytest.mark.parametrize(("kind", "is_fresh"), [("least_squares", True), ("least_squares", False), ("identity", True)])
def test_the_stage_align_fits_before_its_first_step_what_nothing_has_trained(kind: str, is_fresh: bool) -> None:
    settings: dict[str, Any] = {"projectors": kind, "align_cache": "off"}
    align, model = Align(ManticoreConfig(**settings)), hybrid(kind, 1)
    align.is_fresh = is_fresh
    prepare: Any = align.stage().prepare
    prepare(model, SimpleNamespace(data=Supply()), True)
    identity = torch.eye(24)
    assert torch.equal(model.mixtures["blocks.0"].experts.enter[0].weight, identity) == (
        kind == "identity" or not is_fresh
    )
