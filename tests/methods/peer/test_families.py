"""PEER in every family: beside a layer it changes nothing at first, instead of it it acts; caches, masks, saving."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mixwright as mw
from mixwright.backbones.tiny import FAMILIES, tiny_backbone
from mixwright.composition.inputs import example_inputs
from mixwright.methods.peer.model import PeerComposedModel
from mixwright.ops.digest import tensor_digest

SMALL: dict[str, Any] = {"num_experts": (8, 8), "heads": 2, "top_k": 4, "dim_key": 8}
NAMED = ("llama", "gpt_neox", "t5", "bert", "vit", "gpt2", "opt", "albert", "mamba2")
GENERATING = ("llama", "gpt_neox", "gpt2", "opt", "t5")
TEXT = ("llama", "gpt_neox", "t5", "bert", "opt", "albert")


def composed(family: str, mode: str = "replace", **settings: Any) -> PeerComposedModel:
    sites = "mixer" if family == "mamba2" else "all"
    lively = {"initializer_factor": 5.0} if family == "t5" else {"initializer_range": 0.2}
    model = mw.compose("peer", backbone=tiny_backbone(family, **lively), sites=sites, mode=mode, **(SMALL | settings))
    assert isinstance(model, PeerComposedModel)
    return model.eval()


@torch.no_grad()
def lively(model: PeerComposedModel) -> PeerComposedModel:
    """Rows out that say something, and queries that spread."""
    draw = torch.Generator().manual_seed(1)
    for router, experts in model.layers.values():
        experts.table.rows.copy_(torch.randn(experts.table.rows.shape, generator=draw) * 0.3)
        router.queries.weight.copy_(torch.randn(router.queries.weight.shape, generator=draw) * 0.5)
    return model


@pytest.fixture(scope="module")
def built() -> dict[str, PeerComposedModel]:
    """Replacing models of this module, by family; tests leave them as they found them."""
    return {}


@pytest.fixture
def model(request: pytest.FixtureRequest, built: dict[str, PeerComposedModel]) -> PeerComposedModel:
    family = request.param
    if family not in built:
        built[family] = lively(composed(family, "parallel" if family == "mamba2" else "replace"))
    return built[family]


def families(names: tuple[str, ...]) -> Any:
    return pytest.mark.parametrize("model", names, indirect=True)


def inputs_of(model: Any, seed: int = 3) -> dict[str, Tensor]:
    found = example_inputs(model, seed)
    assert found is not None
    return found


def output(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        out = model(**inputs)
    return out.logits if "logits" in out else out.last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
def test_beside_a_layer_the_model_starts_as_its_backbone_to_the_bit(family: str) -> None:
    model = composed(family, "parallel")
    inputs = inputs_of(model.backbone)
    found = output(model, **inputs)
    with model.disabled():
        assert torch.equal(output(model, **inputs), found)
    assert torch.equal(found, output(copy.deepcopy(model).remove(), **inputs))
    lively(model)
    assert (output(model, **inputs) - found).abs().max() > 1e-3  # they stand where they are heard
    model.zero_grad()
    model(**inputs)[0].square().sum().backward()
    assert all(experts.table.rows.grad.any() for _, experts in model.layers.values())


@families(NAMED)
def test_disabled_and_removed_it_is_the_backbone(model: PeerComposedModel) -> None:
    inputs = inputs_of(model.backbone)
    found = output(model, **inputs)
    with model.disabled():
        bare = output(model, **inputs)
    assert (found - bare).abs().max() > 1e-3 and found.isfinite().all()
    mine = copy.deepcopy(model)
    removed = mine.remove()
    family = next(name for name, (kind, _, _) in FAMILIES.items() if kind == removed.config.model_type)
    plain = tiny_backbone(family)
    assert [type(m) for m in removed.modules()] == [type(m) for m in plain.modules()]
    assert [n for n, _ in removed.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert all(p.requires_grad for p in removed.parameters())
    assert torch.equal(output(removed, **inputs), bare)
    assert torch.equal(output(model, **inputs), found)  # a copy was taken apart, not this one


@families(NAMED)
def test_every_token_is_routed_at_every_site(model: PeerComposedModel) -> None:
    inputs = inputs_of(model.backbone)
    with model.trace() as trace:
        output(model, **inputs)
    assert set(trace) == set(model.mixtures)
    for site, passes in trace.items():
        for routing in passes:
            assert routing.num_experts == 64 and routing.indices is not None
            assert routing.weights.shape[-1] == 8 and routing.weights.dim() == 3, site
            torch.testing.assert_close(routing.weights.sum(-1), torch.full(routing.weights.shape[:-1], 2.0))


@families(NAMED)
def test_saved_and_loaded_it_says_the_same(model: PeerComposedModel, tmp_path: Path) -> None:
    inputs = inputs_of(model.backbone)
    found = output(model, **inputs)
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    again = mw.load(folder, backbone=copy.deepcopy(model).remove())
    assert torch.equal(output(again, **inputs), found)
    assert tensor_digest(again) == tensor_digest(model)
    assert again.settings == model.settings
    assert [m.entry for m in again.mixtures.values()] == [m.entry for m in model.mixtures.values()]


@families(TEXT)
def test_padding_is_neither_routed_nor_heard(model: PeerComposedModel) -> None:
    inputs = inputs_of(model.backbone)
    ids = inputs["input_ids"]
    mask = torch.ones_like(ids)
    plain = output(model, **inputs, attention_mask=mask)
    wide, wide_mask = torch.nn.functional.pad(ids, (0, 3), value=5), torch.nn.functional.pad(mask, (0, 3))
    with model.trace() as trace:
        padded = output(model, **{**inputs, "input_ids": wide}, attention_mask=wide_mask)
    real = padded if "decoder_input_ids" in inputs else padded[:, :-3]
    torch.testing.assert_close(real, plain, rtol=1e-4, atol=2e-5)
    for site, passes in trace.items():
        weights = passes[0].weights
        masked = "decoder" not in site.split(".") or model.config.model_type == "opt"
        assert weights.shape[1] == (wide if masked else plain).shape[1]
        assert not masked or ((weights[:, -3:] == 0).all() and (weights[:, :-3].sum(-1) > 1).all())


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.5},
}


@pytest.mark.parametrize(("model", "way"), list(itertools.product(GENERATING, WAYS)), indirect=["model"])
def test_generate_with_and_without_cache(model: PeerComposedModel, way: str) -> None:
    ids = inputs_of(model.backbone)["input_ids"]
    settings: dict[str, Any] = {**WAYS[way], "max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}
    answers: list[Tensor] = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        answers.append(model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=use_cache, **settings))
    assert torch.equal(*answers)
    with model.disabled():
        torch.manual_seed(0)
        assert not torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **settings), answers[0])


@families(("llama", "gpt_neox", "t5"))
def test_padded_rows_generate_the_same(model: PeerComposedModel) -> None:
    ids = inputs_of(model.backbone)["input_ids"]
    settings: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[:, -4:]
    pad = (0, 3) if model.config.is_encoder_decoder else (3, 0)
    wide, mask = (torch.nn.functional.pad(tensor, pad) for tensor in (ids, torch.ones_like(ids)))
    assert torch.equal(model.generate(wide, attention_mask=mask, **settings)[:, -4:], plain)


def test_a_state_space_model_generates() -> None:
    model = lively(composed("mamba2", "parallel"))
    ids = inputs_of(model.backbone)["input_ids"]
    settings: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    both = model.generate(ids, **settings)
    assert torch.equal(both, torch.cat([model.generate(row[None], **settings) for row in ids]))
    with pytest.raises(ValueError, match="no feed-forward layers"):
        mw.compose("peer", backbone=tiny_backbone("mamba2"), **SMALL)


NO_DROPOUT: dict[str, tuple[str, ...]] = {
    "t5": ("dropout_rate",),
    "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "opt": ("dropout", "attention_dropout"),
}


@pytest.mark.parametrize("family", ["llama", "t5", "bert", "opt"])
@pytest.mark.parametrize("mode", ["replace", "parallel"])
def test_training_and_checkpoints(family: str, mode: str) -> None:
    """Only the layer learns; run again by gradient checkpointing, it learns the same, at sites in two halves too."""
    backbone = tiny_backbone(family, **dict.fromkeys(NO_DROPOUT.get(family, ()), 0.0))
    model = lively(mw.compose("peer", backbone=backbone, sites="all", mode=mode, query_norm="layer", **SMALL))
    inputs: dict[str, Any] = {**inputs_of(backbone), **({} if family == "bert" else {"use_cache": False})}
    found: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**inputs)[0].square().mean().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and any(".table.rows" in name for name in found[0])
    assert all(".router." in name or ".experts.table." in name for name in found[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)
