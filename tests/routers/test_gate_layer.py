"""One routed layer against float64 numpy written from the equations, and proof that the comparison sees a wrong score.

The mutation tests put a wrong standardisation into the scores and ask the same comparison, at the same tolerance, to
object: variance over n - 1, no eps, no centring.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import layer_norm

from mixwright.experts.lora import LoraExperts
from mixwright.routers import gate, token
from mixwright.routers.gate import PrototypeScores
from mixwright.routers.token import TokenRouter, choose, choose_among_all
from mixwright.routing import Condition

TOLERANCE = 1e-5
# experts, d_in, d_out, rank, k: those of the sheet, where the authors' own code was measured against float64.
SIZES = [(5, 64, 48, 16, 2), (12, 33, 21, 4, 3), (166, 256, 128, 16, 2), (8, 2048, 512, 16, 2)]


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Layer:
    """The parts of one site, with gates as small as training leaves them (standard deviation 0.1)."""

    def __init__(self, experts, d_in, d_out, rank, k, seed=0, tokens=40):
        self.x = random(seed, tokens, d_in)
        self.gates = random(seed + 1, experts, d_in) * 0.1 + 0.02
        self.down = random(seed + 2, experts, rank, d_in) * d_in**-0.5
        self.up = random(seed + 3, experts, d_out, rank) * rank**-0.5
        self.scale = torch.rand(experts, generator=torch.Generator().manual_seed(seed + 4)) + 0.5
        self.k = k

    def router(self, **options):
        return TokenRouter(PrototypeScores(self.gates), self.k, **options)

    def output(self, router=None):
        routing = (router or self.router())(self.x, Condition())
        experts = LoraExperts(self.down, self.up, self.scale, len(self.gates))
        with torch.no_grad():
            return experts(self.x, routing, Condition()).double().numpy(), routing

    def expected(self, form="paper"):
        """Steps 1 to 5 of the sheet in float64, and the margin to the first expert that was not kept."""
        x, gates = self.x.double().numpy(), self.gates.double().numpy()

        def standard(rows):
            return (rows - rows.mean(-1, keepdims=True)) / np.sqrt(rows.var(-1, keepdims=True) + 1e-5)

        logits = standard(x) @ standard(gates).T / math.sqrt(x.shape[-1])
        order = np.argsort(-logits, axis=-1, kind="stable")
        kept = np.take_along_axis(logits, order[:, : self.k], -1)
        if form == "paper":
            weights = np.exp(kept - kept.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
        else:
            shares = np.exp(logits - logits.max(-1, keepdims=True))
            shares /= shares.sum(-1, keepdims=True)
            weights = np.take_along_axis(shares, order[:, : self.k], -1)
            weights /= weights.sum(-1, keepdims=True) + 1e-6
        out = np.zeros((len(x), self.up.shape[1]))
        down, up, scale = (tensor.double().numpy() for tensor in (self.down, self.up, self.scale))
        for t in range(len(x)):
            for w, e in zip(weights[t], order[t], strict=False):
                out[t] += w * scale[e] * (up[e] @ (down[e] @ x[t]))
        margin = (
            kept[:, -1] - logits[np.arange(len(x)), order[:, self.k]] if self.k < len(gates) else np.full(len(x), 1.0)
        )
        return out, margin, order[:, : self.k], weights


def compare(layer, tolerance=TOLERANCE):
    """What the suite asks of a layer: the same experts wherever the margin is beyond rounding, and the same output."""
    found, routing = layer.output()
    expected, margin, order, _ = layer.expected()
    clear = margin > 1e-5
    assert clear.mean() > 0.9
    assert (np.sort(routing.indices.numpy()[clear]) == np.sort(order[clear])).all(), "other experts were chosen"
    np.testing.assert_allclose(found[clear], expected[clear], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("sizes", SIZES)
def test_a_layer_agrees_with_float64_numpy(sizes):
    compare(Layer(*sizes))


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(8, 65), st.integers(1, 33), st.integers(1, 6), st.data())
def test_layers_of_odd_sizes_agree_too(experts, d_in, d_out, rank, data):
    k = data.draw(st.integers(1, experts))
    # Experts of many narrow features add up to several units: the sheet's tolerance is for outputs of order 1 to 5.
    compare(Layer(experts, d_in, d_out, rank, k, seed=data.draw(st.integers(0, 999)), tokens=20), tolerance=2e-5)


def sample_variance(x):
    wide = x.double()
    return ((wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, unbiased=True, keepdim=True) + 1e-5).sqrt()).to(
        x.dtype
    )


def without_eps(x):
    return layer_norm(x.double(), x.shape[-1:], eps=0.0).to(x.dtype)


def without_centring(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("mutation", [sample_variance, without_eps, without_centring])
def test_the_comparison_objects_to_a_wrong_score(mutation, sizes, monkeypatch):
    layer = Layer(*sizes)
    compare(layer)
    monkeypatch.setattr(gate, "standardise", mutation)
    with pytest.raises(AssertionError):
        compare(layer)


def test_an_equivalent_standardisation_passes_so_the_comparison_is_not_merely_strict(monkeypatch):
    monkeypatch.setattr(
        gate,
        "standardise",
        lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt(),
    )
    for sizes in SIZES:
        compare(Layer(*sizes))


@pytest.mark.parametrize("sizes", SIZES)
def test_the_papers_and_the_codes_weights_agree(sizes):
    layer = Layer(*sizes)
    _, routing = layer.output()
    _, margin, order, weights = layer.expected("code")
    clear = margin > 1e-5
    same = (routing.indices.numpy() == order).all(-1) & clear
    assert same.mean() > 0.9
    np.testing.assert_allclose(routing.weights.numpy()[same], weights[same], atol=1e-4)
    np.testing.assert_allclose(layer.output()[0][same], layer.expected("code")[0][same], atol=1e-4)


def test_permuting_experts_permutes_weights_and_leaves_the_output():
    layer = Layer(9, 40, 20, 4, 3)
    before, routing = layer.output()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    twin = Layer(9, 40, 20, 4, 3)
    twin.gates, twin.down, twin.up, twin.scale = (rows[order] for rows in (twin.gates, twin.down, twin.up, twin.scale))
    after, permuted = twin.output()
    np.testing.assert_allclose(after, before, atol=1e-6)
    torch.testing.assert_close(permuted.dense(), routing.dense()[:, order], atol=1e-6, rtol=0)


def test_a_duplicate_ties_and_two_winning_copies_are_the_expert_itself():
    layer = Layer(6, 40, 20, 4, 2)
    for name in ("gates", "down", "up", "scale"):
        rows = getattr(layer, name)
        setattr(layer, name, torch.cat([rows, rows[2:3]]))
    scores = PrototypeScores(layer.gates)(layer.x)
    torch.testing.assert_close(scores[:, 6], scores[:, 2], atol=1e-6, rtol=0)
    layer.x = layer.gates[2].repeat(5, 1) * 7 + 0.01 * random(9, 5, 40)
    out, routing = layer.output()
    assert set(routing.indices.flatten().tolist()) == {2, 6}
    alone = layer.scale[2] * layer.x @ layer.down[2].T @ layer.up[2].T
    np.testing.assert_allclose(out, alone.double().numpy(), atol=1e-5)


def test_exact_ties_go_to_the_lowest_id():
    layer = Layer(6, 40, 20, 4, 2)
    layer.gates = torch.zeros_like(layer.gates)
    assert (layer.output()[1].indices == torch.tensor([0, 1])).all()


def test_one_expert_is_a_plain_lora():
    layer = Layer(1, 40, 20, 4, 1)
    out, routing = layer.output()
    assert (routing.weights == 1).all()
    plain = layer.scale[0] * layer.x @ layer.down[0].T @ layer.up[0].T
    np.testing.assert_allclose(out, plain.double().numpy(), atol=1e-6)


def test_keeping_all_experts_is_the_dense_softmax_mixture():
    layer = Layer(5, 40, 20, 4, 5)
    out, routing = layer.output()
    shares = torch.softmax(PrototypeScores(layer.gates)(layer.x), -1)
    torch.testing.assert_close(routing.dense(), shares, atol=1e-6, rtol=0)
    each = torch.einsum("te,e,eor,eri,ti->to", shares, layer.scale, layer.up, layer.down, layer.x)
    np.testing.assert_allclose(out, each.double().numpy(), atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_weights_are_a_distribution_over_exactly_k_experts(k):
    routing = Layer(7, 40, 20, 4, k).output()[1]
    dense = routing.dense()
    assert (dense >= 0).all() and ((dense > 0).sum(-1) == k).all()
    torch.testing.assert_close(dense.sum(-1), torch.ones(40), atol=1e-4, rtol=0)


def test_masking_an_expert_equals_removing_it():
    layer, kept = Layer(7, 40, 20, 4, 2), [0, 1, 2, 4, 5, 6]
    masked, routing = layer.output(layer.router(allowed=torch.arange(7) != 3))
    assert not (routing.indices == 3).any()
    for name in ("gates", "down", "up", "scale"):
        setattr(layer, name, getattr(layer, name)[kept])
    removed, without = layer.output()
    np.testing.assert_allclose(masked, removed, atol=1e-6)
    assert (torch.tensor(kept)[without.indices] == routing.indices).all()


def test_a_masked_expert_cannot_move_a_bit_whatever_it_holds():
    layer = Layer(7, 40, 20, 4, 2)
    router = layer.router(allowed=torch.arange(7) != 3)
    before, _ = layer.output(router)
    layer.down[3], layer.up[3], layer.scale[3] = torch.nan, torch.inf, torch.nan
    router.scores.prototypes[3] = torch.nan
    after, _ = layer.output(router)
    assert (before == after).all()


def test_the_short_way_when_all_are_allowed_is_the_masked_one_bit_for_bit() -> None:
    torch.manual_seed(0)
    scores = torch.randn(5, 7, 12).round(decimals=1)  # with ties
    short, masked = choose_among_all(scores, 3), choose(scores, 3)
    assert torch.equal(short.weights, masked.weights) and torch.equal(short.indices, masked.indices)


def test_a_mask_that_is_set_later_is_seen() -> None:
    router = TokenRouter(PrototypeScores(torch.randn(4, 8)), 2)
    x = torch.randn(16, 8)
    before = router(x, Condition())
    assert set(before.indices.flatten().tolist()) == {0, 1, 2, 3}
    router.allowed[2] = False
    after = router(x, Condition())
    assert 2 not in after.indices[after.weights > 0].tolist()
    router.allowed[2] = True
    assert torch.equal(router(x, Condition()).weights, before.weights)


def test_the_short_way_is_taken_where_all_are_allowed_and_only_there(monkeypatch) -> None:
    taken: list[str] = []
    for name in ("choose", "choose_among_all"):
        way = getattr(token, name)
        monkeypatch.setattr(token, name, lambda *given, way=way, name=name: taken.append(name) or way(*given))
    router, x = TokenRouter(PrototypeScores(torch.randn(4, 8)), 2), torch.randn(3, 8)
    router(x, Condition())
    router.allowed[1] = False
    router(x, Condition())
    assert taken == ["choose_among_all", "choose"]
