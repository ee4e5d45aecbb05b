"""Rebalancing moves what is chosen next, and nothing that was computed; on a skewed stream use gets more even."""

import pytest
import torch

from mixwright.evaluation.neuron_usage import usage
from mixwright.methods.peer.layer import PEER
from mixwright.methods.peer.rebalance import Rebalancer, rebalancing


def layer(*, share_keys: bool = True) -> PEER:
    torch.manual_seed(0)
    return PEER(16, (12, 12), heads=2, top_k=4, dim_key=16, query_norm="none", share_keys=share_keys)


def skewed(step: int) -> torch.Tensor:
    """Tokens that mostly lie around one direction."""
    generator = torch.Generator().manual_seed(step)
    towards = torch.randn(16, generator=torch.Generator().manual_seed(99))
    return 2 * towards + torch.randn(64, 16, generator=generator)


@pytest.mark.parametrize("share_keys", [True, False])
def test_a_step_changes_no_output_of_its_own_pass(share_keys: bool) -> None:
    one, other = layer(share_keys=share_keys), layer(share_keys=share_keys)
    x = skewed(0)
    with rebalancing(other, rate=0.5) as balancer:
        y, wanted = other(x), one(x)
        assert torch.equal(y, wanted)
        y.square().sum().backward()
        wanted.square().sum().backward()
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]
        balancer.step()
    assert not torch.equal(other(x), one(x)), "the next pass chooses otherwise"
    assert not other.router.observers


def test_biases_choose_and_do_not_weigh() -> None:
    from mixwright.routing import Condition

    peer, x = layer(), skewed(0)
    with rebalancing(peer, rate=0.5) as balancer:
        peer(x)
        balancer.step()
    found = peer.router.retrieve(x, Condition())
    first, second = peer.router.half_scores(x, Condition())
    scores = (first[..., :, None] + second[..., None, :]).flatten(-2).gather(-1, found.indices)
    torch.testing.assert_close(found.gates, scores.softmax(-1))


def test_use_gets_more_even_on_a_skewed_stream() -> None:
    peer = layer()
    seen = []
    for rate in (0.0, 0.05):
        if rate:
            balancer = Rebalancer(peer, rate)
            for step in range(60):
                peer(skewed(step))
                balancer.step()
            balancer.detach()
        with usage(peer) as meter:
            for step in range(1000, 1010):
                peer(skewed(step))
        seen.append(meter["layer"])
    before, after = seen
    assert after.unevenness < 0.6 * before.unevenness
    assert len(after.dead) < len(before.dead)
    assert (after.first.gini < before.first.gini).all() and (after.second.gini < before.second.gini).all()


def test_biases_keep_their_mean_and_those_kept_out_stay_out() -> None:
    peer = layer(share_keys=False)
    peer.router.bias_first[0, 3] = -torch.inf
    balancer = Rebalancer(peer, 0.1)
    for step in range(5):
        peer(skewed(step))
        balancer.step()
    bias = peer.router.bias_first
    assert bias[0, 3] == -torch.inf and bias.isfinite().sum() == bias.numel() - 1
    assert float(bias[0][bias[0].isfinite()].sum()) == pytest.approx(0.0, abs=1e-5)
    assert float(bias[1].sum()) == pytest.approx(0.0, abs=1e-5) and bias[1].any()


def test_a_rate_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="rate=0"):
        Rebalancer(layer(), 0)
