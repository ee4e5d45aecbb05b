"""Adaptive and unsure retrieval: smallest k by brute force, thresholds of 0 bit for bit, and only what is flagged."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mixwright.routers.adaptive import AdaptiveRouter
from mixwright.routers.product_key import ProductKeyRouter
from mixwright.routers.unsure import FlaggingRouter, LeaningRouter, WideningRouter
from mixwright.routing import Condition

HEADS, K, WIDE = 3, 4, 12


def make(**options: Any) -> ProductKeyRouter:
    torch.manual_seed(0)
    options = {"heads": HEADS, "top_k": K, "dim_key": 8, **options}
    router = ProductKeyRouter(10, (6, 7), **options).eval()
    router.keys_first.data.mul_(3)
    return router


def tokens(seed: int = 1) -> Tensor:
    return torch.randn(4, 9, 10, generator=torch.Generator().manual_seed(seed))


def all_masses(router: ProductKeyRouter, x: Tensor) -> Tensor:
    """The softmax over every expert, (*batch, heads, experts)."""
    first, second = router.half_scores(x, Condition())
    return (first[..., :, None] + second[..., None, :]).flatten(-2).double().softmax(-1)


def thresholds(router: ProductKeyRouter, x: Tensor, quantile: float) -> Tensor:
    found = router.retrieve(x, Condition(), detail=True)
    assert found.coverage is not None
    return torch.quantile(found.coverage.flatten(0, -2), quantile, dim=0)


def padded(x: Tensor) -> tuple[Condition, Tensor]:
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    mask[1, 5:] = False
    return Condition(token_mask=mask), mask


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("wanted", [0.2, 0.5, 0.8])
def test_adaptive_keeps_the_fewest_experts_that_hold_the_wanted_share(share: bool, wanted: float) -> None:
    router = make(share_keys=share)
    found = AdaptiveRouter(router, wanted, WIDE).retrieve(tokens(), Condition())
    best = all_masses(router, tokens()).sort(-1, descending=True).values
    need = (best.cumsum(-1) < wanted).sum(-1) + 1
    kept = (found.gates != 0).sum(-1)
    assert torch.equal(kept, need.clamp_max(WIDE))
    assert len(kept.unique()) > 1, "the number varies"
    assert found.coverage is not None
    held = best.cumsum(-1).gather(-1, kept[..., None] - 1).squeeze(-1)
    torch.testing.assert_close(found.coverage.double(), held, rtol=2e-6, atol=0)
    torch.testing.assert_close(found.gates.sum(-1), torch.ones_like(held).float())
    again = router.retrieve(tokens(), Condition(), top_k=int(kept[0, 0, 0]))
    torch.testing.assert_close(found.gates[0, 0, 0, : kept[0, 0, 0]], again.gates[0, 0, 0])


def test_adaptive_at_one_is_max_k_and_its_mean_k_grows_with_the_share() -> None:
    router = make()
    plain = router.retrieve(tokens(), Condition(), top_k=WIDE)
    whole = AdaptiveRouter(router, 1.0, WIDE).retrieve(tokens(), Condition())
    assert torch.equal(whole.gates, plain.gates) and torch.equal(whole.indices, plain.indices)
    means = [
        float((AdaptiveRouter(router, p, WIDE).retrieve(tokens(), Condition()).gates != 0).float().mean())
        for p in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
    ]
    assert means == sorted(means)
    assert means[0] == pytest.approx(1 / WIDE) and means[-1] == 1.0


def test_adaptive_leaves_padding_out_and_passes_gradients() -> None:
    router = AdaptiveRouter(make(), 0.5, WIDE)
    condition, mask = padded(tokens())
    routing = router(tokens(), condition)
    assert not routing.weights[~mask].any()
    (routing.weights * torch.arange(HEADS * WIDE)).sum().backward()
    grad = router.router.queries.weight.grad
    assert grad is not None and grad.isfinite().all() and grad.any()


@pytest.mark.parametrize("training", [True, False])
def test_a_threshold_of_zero_is_the_plain_router_bit_for_bit(training: bool) -> None:
    zero = torch.zeros(HEADS)
    plain = make().train(training)(tokens(), Condition())
    for kind in (FlaggingRouter, lambda r, t: WideningRouter(r, t, WIDE), LeaningRouter):
        found = kind(make().train(training), zero)(tokens(), Condition())
        width = HEADS * K
        assert torch.equal(found.weights[..., :width], plain.weights)
        assert torch.equal(found.indices[..., :width], plain.indices)
        assert not found.weights[..., width:].any()


@pytest.mark.parametrize("share", [True, False])
def test_widening_gives_more_experts_to_flagged_heads_and_to_no_others(share: bool) -> None:
    router, x = make(share_keys=share), tokens()
    limits = thresholds(router, x, 0.3)
    plain, wide = (router.retrieve(x, Condition(), top_k=k, detail=True) for k in (K, WIDE))
    found = WideningRouter(router, limits, WIDE).retrieve(x, Condition())
    assert plain.coverage is not None and found.flagged is not None and found.coverage is not None
    flagged = plain.coverage < limits
    assert torch.equal(found.flagged, flagged) and flagged.any() and not flagged.all()
    torch.testing.assert_close(found.gates[flagged], wide.gates[flagged])
    assert torch.equal(found.indices[flagged], wide.indices[flagged])
    assert torch.equal(found.gates[~flagged][:, :K], plain.gates[~flagged])
    assert torch.equal(found.indices[~flagged][:, :K], plain.indices[~flagged])
    assert not found.gates[~flagged][:, K:].any()
    extra = int((found.gates != 0).sum()) - flagged.numel() * K
    assert extra == int(flagged.sum()) * (WIDE - K), "extra work is the share that was flagged"
    assert (found.coverage[flagged] > plain.coverage[flagged]).all()


def test_only_tokens_that_are_flagged_are_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    router, x = make(), tokens()
    unsure = WideningRouter(router, thresholds(router, x, 0.1), WIDE)
    asked: list[int] = []
    find = ProductKeyRouter.find

    def counting(self: ProductKeyRouter, queries: Tensor, **options: Any) -> Any:
        asked.append(queries.shape[:-3].numel())
        return find(self, queries, **options)

    monkeypatch.setattr(ProductKeyRouter, "find", counting)
    flagged = unsure.retrieve(x, Condition()).flagged
    assert flagged is not None
    assert asked == [x.shape[0] * x.shape[1], int(flagged.any(-1).sum())]


def test_leaning_weighs_the_dense_branch_by_what_flagged_heads_missed() -> None:
    router, x = make(), tokens()
    limits = thresholds(router, x, 0.3)
    plain = router.retrieve(x, Condition(), detail=True)
    routing = LeaningRouter(router, limits)(x, Condition())
    assert plain.coverage is not None
    flagged = plain.coverage < limits
    wanted = ((1 - plain.coverage) * flagged).mean(-1)
    torch.testing.assert_close(routing.weights[..., -1], wanted)
    assert routing.num_experts == router.num_experts + 1
    assert (routing.indices[..., -1] == router.num_experts).all()
    assert (wanted[~flagged.any(-1)] == 0).all() and (wanted[flagged.any(-1)] > 0).all()


@pytest.mark.parametrize("kind", [FlaggingRouter, lambda r, t: WideningRouter(r, t, WIDE), LeaningRouter])
def test_padding_is_never_unsure(kind: Any) -> None:
    router = make()
    condition, mask = padded(tokens())
    unsure = kind(router, torch.full((HEADS,), 2.0))
    found = unsure.retrieve(tokens(), condition)
    assert found.flagged[mask].all() and not found.flagged[~mask].any()
    assert not unsure(tokens(), condition).weights[~mask].any()


def test_thresholds_are_saved_and_stay_exact_when_a_model_is_narrowed() -> None:
    limits = torch.tensor([0.1001, 0.2002, 0.3003])
    state = WideningRouter(make(), limits, WIDE).state_dict()
    other = WideningRouter(make(), torch.zeros(HEADS), WIDE + 1)
    other.load_state_dict(state)
    assert torch.equal(other.thresholds, limits) and int(other.wider) == WIDE
    assert torch.equal(other.bfloat16().thresholds, limits)
    assert torch.equal(AdaptiveRouter(make(), 0.9001, WIDE).bfloat16().coverage, torch.tensor(0.9001))


def test_what_can_not_be_is_refused() -> None:
    with pytest.raises(ValueError, match="gates are 'sigmoid'"):
        FlaggingRouter(make(gate="sigmoid"), torch.zeros(HEADS))
    with pytest.raises(ValueError, match="gates are 'relu'"):
        AdaptiveRouter(make(gate="relu"), 0.5, WIDE)
    with pytest.raises(ValueError, match="one for each of the 3 heads"):
        FlaggingRouter(make(), torch.zeros(2))
    with pytest.raises(ValueError, match="more than top_k=4"):
        WideningRouter(make(), torch.zeros(HEADS), K)
    with pytest.raises(ValueError, match="max_k=43"):
        AdaptiveRouter(make(), 0.5, 43)
    with pytest.raises(ValueError, match="coverage=nan"):
        AdaptiveRouter(make(), float("nan"), 4)
