"""The product-key router: gates, biases, ablation, measures, candidates, heads apart, and what it refuses."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from mixwright.ops import route
from mixwright.routers.product_key import ProductKeyRouter
from mixwright.routing import Condition

D = 6


def router(grid: tuple[int, int] = (5, 6), seed: int = 0, **options: Any) -> ProductKeyRouter:
    torch.manual_seed(seed)
    made = ProductKeyRouter(D, grid, **{"heads": 2, "top_k": 4, "dim_key": 8, "query_norm": "none", **options})
    return made.double().eval()


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return 3 * torch.randn(*(shape or (2, 9)), D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def every_score(made: ProductKeyRouter, x: Tensor) -> Tensor:
    first, second = made.half_scores(x, Condition())
    return (first[..., :, None] + second[..., None, :]).flatten(-2)


EXPECTED = {
    "softmax": lambda s: s.softmax(-1),
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "renormalised": lambda s: torch.sigmoid(s) / torch.sigmoid(s).sum(-1, keepdim=True),
    "one": torch.ones_like,
}


@pytest.mark.parametrize("share_keys", [True, False])
@pytest.mark.parametrize("gate", EXPECTED)
def test_gates(gate: str, share_keys: bool) -> None:
    made, x = router(gate=gate, share_keys=share_keys), tokens()
    best = every_score(made, x).topk(4, -1)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = made.retrieve(x, Condition())
        assert torch.equal(found.indices, best.indices)
        torch.testing.assert_close(found.scores, best.values)
        torch.testing.assert_close(found.gates, EXPECTED[gate](best.values))
    routing = made(x, Condition())
    assert routing.weights.shape == (2, 9, 8) and routing.num_experts == 30


def test_float32_and_narrower_ask_in_float32() -> None:
    made = ProductKeyRouter(D, (5, 6), 2, 4, 8, query_norm="layer")
    x = tokens().float()
    assert made(x, Condition()).weights.dtype == torch.float32
    narrow = copy.deepcopy(made).bfloat16()
    assert narrow(x.bfloat16(), Condition()).weights.dtype == torch.float32
    assert narrow.bias_first.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(made(x, Condition()).weights, made(x, Condition()).weights)
        inside = made(x, Condition()).weights
    assert torch.equal(inside, made(x, Condition()).weights)


@pytest.mark.parametrize("gate", EXPECTED)
def test_biases_choose_and_do_not_weigh(gate: str) -> None:
    made, x = router(gate=gate), tokens()
    made.bias_first[0, 2] = 1000.0
    made.bias_second[0, 3] = -torch.inf
    found = made.retrieve(x, Condition())
    rows, columns = found.indices // 6, found.indices % 6
    assert rows.eq(2).all() and columns.ne(3).all()
    torch.testing.assert_close(found.scores, every_score(made, x).gather(-1, found.indices))
    made.bias_second[0] = -torch.inf
    made.bias_second[0, 1] = 0.0
    x.requires_grad_(True)
    few = made.retrieve(x, Condition(), top_k=7)
    kept = few.scores > -torch.inf
    assert kept.sum(-1).eq(5).all()
    assert few.gates[~kept].eq(0).all()
    if gate != "one":
        few.gates.sum().backward()
        assert x.grad is not None and x.grad.isfinite().all()
    made.bias_second[0] = -torch.inf
    none = made.retrieve(x, Condition())
    assert none.gates.eq(0).all()
    if gate != "one":
        x.grad = None
        none.gates.sum().backward()
        assert x.grad is not None and x.grad.eq(0).all()


@pytest.mark.parametrize("share_keys", [True, False])
def test_ablated_experts_never_appear_and_the_next_best_do(share_keys: bool) -> None:
    made, x = router(share_keys=share_keys), tokens()
    gone = made(x, Condition()).indices.flatten().bincount(minlength=30).topk(15).indices  # type: ignore[union-attr]
    made.ablated = torch.zeros(30, dtype=torch.bool)
    made.ablated[gone] = True
    found = made.retrieve(x, Condition())
    scores = every_score(made, x)
    scores[..., gone] = -torch.inf
    best = scores.topk(4, -1)
    assert torch.equal(found.indices, best.indices)
    torch.testing.assert_close(found.scores, best.values)
    made.ablated[:] = True
    made.ablated[[7, 9]] = False
    found = made.retrieve(x, Condition())
    assert set(found.indices.unique().tolist()) == {7, 9}
    assert found.gates[..., 2:].eq(0).all() and found.gates[..., :2].gt(0).all()
    fresh = router(share_keys=share_keys)
    fresh.load_state_dict(made.state_dict())
    assert torch.equal(fresh.retrieve(x, Condition()).gates, found.gates)


def test_measures_equal_brute_force() -> None:
    made, x = router(), tokens()
    for k in (1, 4, 29):
        found = made.retrieve(x, Condition(), top_k=k, detail=True)
        every = every_score(made, x)
        probability = every.softmax(-1)
        best = probability.topk(k, -1).values.sum(-1)
        torch.testing.assert_close(found.coverage, best)
        torch.testing.assert_close(found.entropy, torch.distributions.Categorical(probability).entropy())
        ordered = every.sort(-1, descending=True).values
        torch.testing.assert_close(found.margin, ordered[..., k - 1] - ordered[..., k])
        bare = made.retrieve(x, Condition(), top_k=k)
        assert bare.coverage is None
        assert torch.equal(bare.indices, found.indices) and torch.equal(bare.gates, found.gates)
    all_of_them = made.retrieve(x, Condition(), top_k=30, detail=True)
    torch.testing.assert_close(all_of_them.coverage, torch.ones(2, 9, 2, dtype=torch.float64))
    assert all_of_them.margin is not None and all_of_them.margin.eq(torch.inf).all()
    made.bias_first[0, 1:] = -torch.inf
    one_row = made.retrieve(x, Condition(), top_k=6, detail=True)
    torch.testing.assert_close(one_row.coverage, torch.ones(2, 9, 2, dtype=torch.float64))


def test_fewer_candidates_per_half() -> None:
    made, x = router((8, 8), half_top_k=2, top_k=4), tokens()
    found = made.retrieve(x, Condition())
    first, second = made.half_scores(x, Condition())
    pairs = first.topk(2, -1).values[..., :, None] + second.topk(2, -1).values[..., None, :]
    torch.testing.assert_close(found.scores, pairs.flatten(-2).sort(-1, descending=True).values)


def test_heads_apart_have_experts_of_their_own() -> None:
    made, x = router(separate_heads=True), tokens()
    together = router()
    one, other = made.retrieve(x, Condition()), together.retrieve(x, Condition())
    assert made.num_experts == 60
    assert torch.equal(one.indices, other.indices + torch.tensor([[0], [30]]))
    torch.testing.assert_close(one.gates, other.gates)
    made.ablated = torch.zeros(60, dtype=torch.bool)
    made.ablated[one.indices[0, 0, 1, 0]] = True
    after = made.retrieve(x, Condition())
    assert torch.equal(after.indices[:, :, 0], one.indices[:, :, 0])
    assert int(one.indices[0, 0, 1, 0]) not in after.indices


@pytest.mark.parametrize("norm", ["layer", "rms", "l2"])
def test_key_norms_ignore_lengths(norm: str) -> None:
    made, x = router(key_norm=norm), tokens()
    before = made.retrieve(x, Condition())
    with torch.no_grad():
        made.keys_first.mul_(torch.rand(1, 5, 1) * 50 + 50)
    after = made.retrieve(x, Condition())
    torch.testing.assert_close(after.gates, before.gates, rtol=1e-2, atol=1e-2)
    made.retrieve(x, Condition()).gates[..., 0].sum().backward()
    assert made.keys_first.grad is not None and made.keys_first.grad.abs().sum() > 0


def test_tokens_in_pieces_are_tokens_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = router(), tokens(3, 20)
    whole = made.retrieve(x, Condition(), detail=True)
    monkeypatch.setattr(route, "BUFFER", 3 * 2 * 11)
    calls: list[int] = []
    inside = route._choose
    monkeypatch.setattr(
        route,
        "_choose",
        lambda native, found, *rest: (calls.append(len(found.scores)), inside(native, found, *rest))[1],
    )
    parts = made.retrieve(x, Condition(), detail=True)
    assert max(calls) <= 3 * 2 and sum(calls) == 60 * 2
    for name in ("scores", "gates", "indices", "coverage", "entropy", "margin"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


def test_masked_tokens_have_no_weight_and_give_no_gradient() -> None:
    made, x = router(query_norm="batch").train(), tokens().requires_grad_()
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9]).bool()
    routing = made(x, Condition(token_mask=mask))
    assert routing.weights[~mask].eq(0).all() and routing.weights[mask].gt(0).all()
    (routing.weights**2).sum().backward()
    assert x.grad is not None and x.grad[~mask].eq(0).all() and x.grad[mask].abs().sum() > 0
    cached = torch.cat([torch.zeros(2, 7).bool(), mask], 1)  # a cache's tokens come before
    again = made(x, Condition(token_mask=cached))
    assert again.weights[~mask].eq(0).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 31}, "top_k=31, but a grid of 5 x 6 has 30 experts; choose 1 <= top_k <= 30"),
        ({"top_k": 0}, "top_k=0"),
        ({"dim_key": 7}, "dim_key=7: a query is two halves"),
        ({"heads": 0}, "heads=0"),
        ({"grid": (0, 6)}, r"grid=\(0, 6\)"),
        ({"half_top_k": 1}, "half_top_k=1"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        router(options.pop("grid", (5, 6)), **options)


def test_inputs_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="x has width 5 on its last axis; this router was built for 6"):
        router()(torch.zeros(1, 2, 5), Condition())
    with pytest.raises(ValueError, match="top_k=31"):
        router().retrieve(tokens(), Condition(), top_k=31)
