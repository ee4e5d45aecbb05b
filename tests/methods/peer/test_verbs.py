"""The verbs of a layer and of a composed model, and that what they set is saved and comes back."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import mixwright as mw
from mixwright.backbones.tiny import tiny_backbone
from mixwright.errors import CatalogError
from mixwright.experts.dense_branch import DenseNeurons
from mixwright.experts.table import initial_rows
from mixwright.methods.peer.config import METHOD
from mixwright.methods.peer.layer import PEER
from mixwright.methods.peer.model import PeerComposedModel
from mixwright.methods.peer.usage import keep_usage, kept_usage

from .neuron_model import batches


def composed(**options: Any) -> PeerComposedModel:
    backbone = tiny_backbone("llama")
    settings = {"num_experts": (8, 6), "heads": 2, "top_k": 4, "dim_key": 16, "sites": "all", **options}
    model = mw.compose("peer", backbone=backbone, **settings)
    assert isinstance(model, PeerComposedModel)
    for router, _ in model.layers.values():
        router.keys_first.data.mul_(4)
    return model.eval()


def dense(bias: bool) -> DenseNeurons:
    torch.manual_seed(5)
    extra = (torch.randn(5, 1), torch.randn(32)) if bias else ()
    return DenseNeurons(initial_rows(5, 2, 32, 0.5), "gelu", *extra)


def change(model: PeerComposedModel, fallback: str) -> None:
    limits = model.coverage_thresholds(batches(2), 0.4)
    if fallback == "flag":
        model.flag_unsure(limits)
    elif fallback == "widen":
        model.widen_unsure(limits, 12)
    elif fallback.startswith("lean"):
        model.lean_unsure(limits, {site: dense("bias" in fallback) for site in limits})
    else:
        model.retrieve_adaptively(0.3, 9)


@pytest.mark.parametrize("fallback", ["flag", "widen", "lean", "lean with bias", "adaptive"])
@pytest.mark.parametrize("shared", [False, True])
def test_fallbacks_thresholds_ablation_and_usage_are_saved(fallback: str, shared: bool, tmp_path: Path) -> None:
    model, batch = composed(shared_table=shared), batches(1)[0]
    plain = model(**batch).logits
    change(model, fallback)
    model.ablate([3, 7])
    keep_usage(model)
    wanted = model(**batch).logits
    assert not torch.equal(wanted, plain)
    assert all(isinstance(pair[1].table.num_experts, int) for pair in model.layers.values())
    model.save_pretrained(tmp_path / "saved")
    again = mw.load(tmp_path / "saved", backbone=copy.deepcopy(model).remove())
    assert isinstance(again, PeerComposedModel)
    assert torch.equal(again.eval()(**batch).logits, wanted)
    for site, mixture in model.mixtures.items():
        other = again.mixtures[site]
        assert type(other.router) is type(mixture.router) and type(other.experts) is type(mixture.experts)
        assert torch.equal(kept_usage(again)[site], kept_usage(model)[site])
    tables = {id(experts.table) for _, experts in again.layers.values()}
    assert len(tables) == (1 if shared else 2)
    again.retrieve_plainly()
    again.unablate()
    assert torch.equal(again(**batch).logits, plain)


def test_tensors_that_stand_around_nothing_known_are_refused() -> None:
    model = composed()
    change(model, "widen")
    state, settings, backbone = model.added_state(), model.settings, model.remove()
    name = next(name for name in state if name.endswith(".wider"))
    odd = {**state, name.replace(".wider", ".leaning"): torch.ones((), dtype=torch.bool)}
    short = {key: t[:1] if key.endswith(".thresholds") else t for key, t in state.items()}
    for broken, words in ((odd, "no router is known that has"), (short, "one for each of the 2 heads")):
        with pytest.raises(CatalogError, match=words):
            METHOD.restore(settings, backbone, broken, ())


def test_a_layer_has_the_verbs_too() -> None:
    torch.manual_seed(0)
    peer = PEER(16, (6, 7), heads=2, top_k=4, dim_key=8).eval()
    x = torch.randn(3, 20, 16)
    plain = peer(x)
    limits = peer.coverage_thresholds([x], 0.3)
    assert limits["layer"].shape == (2,)
    peer.widen_unsure(limits, 8)
    with peer.usage() as meter:
        assert not torch.equal(peer(x), plain)
    assert meter["layer"].tokens == 60
    assert "WideningRouter" in repr(peer)
    peer.lean_unsure(limits, {"layer": DenseNeurons(initial_rows(5, 2, 16, 0.5))})
    found = peer.explain(x)["layer"]
    assert found.dense is not None
    torch.testing.assert_close(found.outputs, peer(x).flatten(0, 1))
    peer.flag_unsure(limits)
    assert torch.equal(peer(x), plain)
    peer.retrieve_adaptively(1.0, 4)
    assert torch.equal(peer(x), plain)
    peer.retrieve_plainly()
    with peer.ablated([1, 2]):
        assert not torch.equal(peer(x), plain)
    with peer.rebalancing(0.1) as balancer:
        peer(x)
        balancer.step()
    assert peer.router.bias_first.any()
    peer.router.bias_first.zero_()
    peer.router.bias_second.zero_()
    assert torch.equal(peer(x), plain)
    with peer.usage() as meter:
        peer(x[:1, :2])
    assert peer.revive([x[:1, :2]], meter.usage()).count() > 0
