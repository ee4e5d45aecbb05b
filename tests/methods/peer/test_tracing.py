"""Ablated neurons never appear, others move up, and it can be taken back; an explanation adds up at every site."""

from typing import Any

import pytest
import torch

from mixwright.evaluation.neuron_usage import usage
from mixwright.methods.peer.growth import admit, grow
from mixwright.methods.peer.layer import PEER
from mixwright.methods.peer.tracing import ablate, ablated, explain, origins_of, unablate
from mixwright.routing import Condition

from .neuron_model import SITES, batches, neuron_model


def layer(**options: Any) -> PEER:
    torch.manual_seed(0)
    return PEER(16, (6, 7), **{"heads": 2, "top_k": 4, "dim_key": 8, **options}).eval()


def tokens() -> torch.Tensor:
    return torch.randn(3, 20, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("share_keys", [True, False])
def test_ablated_neurons_never_appear_and_the_next_best_stand_in(share_keys: bool) -> None:
    peer, x = layer(share_keys=share_keys), tokens()
    often = torch.bincount(peer.router(x, Condition()).indices.flatten(), minlength=42).topk(9).indices
    plain = peer(x)
    ablate(peer, often)
    found = peer.router.retrieve(x, Condition())
    assert not torch.isin(found.indices, often).any()
    first, second = peer.router.half_scores(x, Condition())
    scores = (first[..., :, None] + second[..., None, :]).flatten(-2)
    best = scores.index_fill(-1, often, -torch.inf).topk(4).values
    torch.testing.assert_close(found.scores, best)
    torch.testing.assert_close(found.gates, best.softmax(-1))
    assert not torch.equal(peer(x), plain)
    unablate(peer, often[:4].tolist())
    assert torch.equal(peer.router.ablated.nonzero().flatten(), often[4:].sort().values)  # type: ignore[union-attr]
    unablate(peer)
    assert torch.equal(peer(x), plain)


def test_ablation_is_saved_and_a_block_takes_it_back() -> None:
    peer, x = layer(), tokens()
    plain = peer(x)
    with ablated(peer, range(10)):
        inside = peer(x)
        state = peer.state_dict()
    assert torch.equal(peer(x), plain)
    other = layer()
    other.load_state_dict(state)
    assert torch.equal(other(x), inside) and not torch.equal(inside, plain)


def test_ids_and_sites_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="id 42: the grid has 42 experts"):
        ablate(layer(), [3, 42])
    with pytest.raises(ValueError, match="no site 'there'; there are layer"):
        ablate(layer(), [3], site="there")


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"gated": True}, {"row_dim": 4}, {"gate": "sigmoid"}, {"gate": "relu"}, {"share_keys": False}]
)
def test_an_explanation_of_a_layer_adds_up(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixwright.methods.peer.layer.QUERY_BYTES", 1024)
    peer, x = layer(**options), tokens()
    assert peer._piece(x) < 60, "it takes its tokens in pieces"
    found = explain(peer, x)["layer"]
    y = peer(x).flatten(0, 1)
    assert float((found.outputs - y).norm() / y.norm()) < 1e-6
    assert len(found.token(0)) == int((found.gates[0] != 0).sum())


def test_presets_add_up() -> None:
    torch.manual_seed(0)
    for name in ("paper", "peer_pytorch", "memory_plus"):
        peer, x = PEER.preset(name, 16, num_experts=(8, 8), heads=2, top_k=4, dim_key=8).eval(), tokens()
        found = explain(peer, x)["layer"]
        with torch.no_grad():
            y = peer(x).flatten(0, 1)
        assert float((found.outputs - y).norm() / y.norm()) < 1e-6, name


@pytest.mark.parametrize("shared", [False, True])
def test_an_explanation_of_a_composed_model_adds_up_at_every_site(shared: bool) -> None:
    model, batch = neuron_model(shared=shared), batches(1)[0]
    added: dict[str, torch.Tensor] = {}
    hooks = [
        mixture.experts.register_forward_hook(lambda m, a, out, site=site: added.__setitem__(site, out))
        for site, mixture in model.mixtures.items()
    ]
    found = explain(model, **batch)
    for hook in hooks:
        hook.remove()
    assert tuple(found) == SITES
    real = batch["attention_mask"].bool().flatten()
    for site in SITES:
        y = added[site].flatten(0, 1)
        assert float((found[site].outputs - y).norm() / y.norm()) < 1e-6
        assert not found[site].gates[~real].any()
        assert found[site].coverage is not None and found[site].coverage.shape == (36, 2)


def test_ablating_at_one_site_leaves_the_others() -> None:
    model, (batch, *_) = neuron_model(), batches(1)
    with usage(model) as meter:
        model(**batch)
    ids = meter[SITES[1]].counts.topk(5).indices
    with ablated(model, ids, site=SITES[1]), usage(model) as without:
        model(**batch)
        assert model.added_state()[f"{SITES[1]}.router.ablated"].sum() == 5
    assert not without[SITES[1]].counts[ids].any()
    assert torch.equal(without[SITES[0]].counts, meter[SITES[0]].counts)
    assert without[SITES[1]].counts.sum() == meter[SITES[1]].counts.sum(), "slots are filled again"


def test_acting_neurons_know_where_they_came_from() -> None:
    peer, x = layer(), tokens()
    new = grow(peer.router, peer.experts, 2, source="later", step=7)
    admit(peer.router, peer.experts)
    trace = explain(peer, x)["layer"]
    acting = [neuron for token in range(len(trace.ids)) for neuron in trace.token(token)]
    came = origins_of(peer, "layer", acting)
    assert {(origin.step, origin.source) for origin in came} == {(0, ""), (7, "later")}
    assert all((neuron.id in new) == (origin.step == 7) for neuron, origin in zip(acting, came, strict=True))
