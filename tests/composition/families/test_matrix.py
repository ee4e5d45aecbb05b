"""Every family of backbones behaves alike under a pool of experts: a matrix of family x behaviour on tiny configs."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mixwright.backbones.tiny import FAMILIES, tiny_backbone
from mixwright.composition.inputs import example_inputs
from mixwright.composition.model import ComposedModel
from mixwright.ops.digest import tensor_digest
from mixwright.routing import Routing

NAMED = ("t5", "gpt2", "gpt_neox", "llama", "qwen3", "gemma", "mistral", "bert", "vit")
UNLISTED = ("opt", "falcon", "phi", "gemma3", "mixtral", "mamba2", "bart", "distilbert", "roberta", "albert", "whisper")
GENERATING = ("t5", "gpt2", "gpt_neox", "llama", "qwen3", "gemma", "mistral", "opt", "falcon", "phi", "gemma3", "bart")
TEXT = tuple(family for family in (*NAMED, *UNLISTED) if FAMILIES[family][1] != "speech" and family != "vit")
PADDED = tuple(family for family in TEXT if family != "mamba2")  # a state-space model reads its padding
FIXED_POSITIONS = ("roberta", "distilbert")  # counted from the left whatever the mask says: only right padding is fair


@pytest.fixture(scope="module")
def built() -> dict[str, ComposedModel]:
    """Composed models of this module, by family; tests leave them as they found them."""
    return {}


@pytest.fixture
def model(
    request: pytest.FixtureRequest, built: dict[str, ComposedModel], pool_of: Any, composed: Any
) -> ComposedModel:
    family = request.param
    if family not in built:
        backbone = tiny_backbone(family)
        built[family] = composed(backbone, pool_of(backbone))
    return built[family]


def families(names: tuple[str, ...]) -> Any:
    return pytest.mark.parametrize("model", names, indirect=True)


def inputs_of(model: ComposedModel, seed: int = 3) -> dict[str, Tensor]:
    found = example_inputs(model.backbone, seed)
    assert found is not None
    return found


def output(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        out = model(**inputs)
    return out.logits if "logits" in out else out.last_hidden_state


def traced(model: ComposedModel, call: Callable[[], Any]) -> dict[str, list[Routing]]:
    with model.trace() as trace, torch.no_grad():
        call()
    return trace


@families(NAMED + UNLISTED)
def test_forward_is_routed_and_finite(model: ComposedModel) -> None:
    inputs = inputs_of(model)
    routed = output(model, **inputs)
    with model.disabled():
        bare = output(model, **inputs)
    assert torch.isfinite(routed).all()
    assert (routed - bare).abs().max() > 1e-3
    trace = traced(model, lambda: model(**inputs))
    assert set(trace) == set(model.mixtures) == set(model.probe.sites)
    for site, passes in trace.items():
        for routing in passes:
            assert routing.weights.dim() == (2 if model.probe.sites[site].stream.startswith("alone") else 3)
            torch.testing.assert_close(routing.weights.sum(-1), torch.ones(routing.weights.shape[:-1]))


@families(NAMED + UNLISTED)
def test_adapters_off_is_the_backbone_bit_for_bit(model: ComposedModel, request: pytest.FixtureRequest) -> None:
    bare = tiny_backbone(request.node.callspec.params["model"])
    inputs = inputs_of(model)
    with model.disabled():
        assert torch.equal(output(model, **inputs), output(bare, **inputs))


@families(NAMED + UNLISTED)
def test_remove_gives_back_the_backbone(model: ComposedModel, request: pytest.FixtureRequest) -> None:
    bare = tiny_backbone(request.node.callspec.params["model"])
    mine = copy.deepcopy(model)
    removed = mine.remove()
    assert tensor_digest(removed) == tensor_digest(bare)
    assert [type(m) for m in removed.modules()] == [type(m) for m in bare.modules()]
    assert [p.requires_grad for p in removed.parameters()] == [p.requires_grad for p in bare.parameters()]
    assert torch.equal(output(removed, **inputs_of(model)), output(bare, **inputs_of(model)))
    assert (output(model, **inputs_of(model)) - output(bare, **inputs_of(model))).abs().max() > 1e-3


@families(NAMED + UNLISTED)
def test_gradient_reaches_every_site(model: ComposedModel) -> None:
    mine = copy.deepcopy(model)
    out = mine(**inputs_of(model))
    (out.logits if "logits" in out else out.last_hidden_state).square().sum().backward()
    for site, mixture in mine.mixtures.items():
        assert mixture.experts.up.grad is not None, site
        assert mixture.experts.up.grad.abs().sum() > 0, site
    assert all(p.grad is None for name, p in mine.named_parameters() if ".experts." not in name)


@families(PADDED)
def test_padding_changes_nothing(model: ComposedModel) -> None:
    inputs = inputs_of(model)
    ids = inputs["input_ids"]
    mask = torch.ones_like(ids)
    plain = output(model, **inputs, attention_mask=mask)
    two_streams = "decoder_input_ids" in inputs
    fixed = two_streams or model.config.model_type in FIXED_POSITIONS
    sides = ("right",) if fixed else ("left", "right")
    for side in sides:
        pad = (3, 0) if side == "left" else (0, 3)
        wide = torch.nn.functional.pad(ids, pad, value=5)
        wide_mask = torch.nn.functional.pad(mask, pad)
        extra = {}
        if side == "left" and "position_ids" in model.forward.__signature__.parameters:
            extra["position_ids"] = (wide_mask.cumsum(-1) - 1).clamp_min(0)
        padded = output(model, **{**inputs, "input_ids": wide}, attention_mask=wide_mask, **extra)
        real = padded if two_streams else padded[:, 3:] if side == "left" else padded[:, :-3]
        torch.testing.assert_close(real, plain, rtol=1e-4, atol=2e-5)


@families(NAMED + UNLISTED)
def test_batch_order_changes_nothing(model: ComposedModel) -> None:
    inputs = inputs_of(model)
    forward, backward = output(model, **inputs), output(model, **{k: v.flip(0) for k, v in inputs.items()})
    torch.testing.assert_close(backward.flip(0), forward, rtol=1e-4, atol=2e-5)
    alone = output(model, **{k: v[:1] for k, v in inputs.items()})
    torch.testing.assert_close(alone, forward[:1], rtol=1e-4, atol=2e-5)


@families(GENERATING)
@pytest.mark.parametrize("mode", ["greedy", "beam", "sampled"])
def test_generate_with_and_without_cache(model: ComposedModel, mode: str) -> None:
    ids = inputs_of(model)["input_ids"]
    settings: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
    settings |= {"beam": {"num_beams": 3}, "sampled": {"do_sample": True, "temperature": 1.5}}.get(mode, {})
    answers = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        answers.append(
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=use_cache, **settings)
        )
    assert torch.equal(*answers)
    with model.disabled():
        torch.manual_seed(0)
        assert model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings).shape[0] == len(ids)


@families(tuple(f for f in GENERATING if FAMILIES[f][1] == "causal"))
def test_incremental_equals_full(model: ComposedModel) -> None:
    ids = inputs_of(model)["input_ids"]
    with model.trace() as whole:
        full = output(model, input_ids=ids)
    steps, logits, cache = [], [], None
    with torch.no_grad():
        for t in range(ids.shape[1]):
            with model.trace() as step:
                out = model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
            steps.append(step)
    torch.testing.assert_close(torch.cat(logits, 1), full, rtol=1e-4, atol=2e-5)
    for site in whole:
        parts = torch.cat([step[site][0].dense() for step in steps], 1)
        torch.testing.assert_close(parts, whole[site][0].dense(), rtol=1e-3, atol=1e-4)


@families(GENERATING)
def test_left_padded_generate(model: ComposedModel) -> None:
    ids = inputs_of(model)["input_ids"][:1]
    settings: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[:, -4:]
    side = (0, 3) if model.config.is_encoder_decoder else (3, 0)
    wide = torch.nn.functional.pad(ids, side, value=0)
    mask = torch.nn.functional.pad(torch.ones_like(ids), side)
    padded = model.generate(input_ids=wide, attention_mask=mask, **settings)[:, -4:]
    assert torch.equal(plain, padded)
