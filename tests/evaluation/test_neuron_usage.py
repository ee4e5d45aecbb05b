"""Usage of neurons: counts conserve, padding and recomputation do not count, and nothing runs over the whole table."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mixwright.evaluation.neuron_usage import UsageMeter, usage
from mixwright.ops.spread import unevenness
from mixwright.routers.adaptive import AdaptiveRouter
from mixwright.routers.unsure import LeaningRouter, WideningRouter
from mixwright.routing import Condition

from .neuron_layer import neuron_layer, tokens

HEADS, K, N1, N2 = 2, 3, 5, 4


@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "relu", "renormalised"])
@pytest.mark.parametrize("share", [True, False])
def test_counts_conserve(gate: Any, share: bool) -> None:
    peer, x = neuron_layer(gate=gate, share_keys=share), tokens(3, 7)
    with usage(peer) as meter:
        peer(x)
        peer(x[:1])
    found = meter["layer"]
    with torch.no_grad():
        routing = peer.router(torch.cat([x, x[:1]]), Condition())
    acting = routing.weights != 0
    assert found.tokens == 28
    assert int(found.counts.sum()) == int(acting.sum()) <= 28 * HEADS * K
    assert (gate == "relu") == (int(acting.sum()) < 28 * HEADS * K)
    wanted = torch.zeros(N1 * N2).double().index_add_(0, routing.indices[acting], routing.weights[acting].double())
    torch.testing.assert_close(found.mass, wanted)
    for axis, places in ((found.first, N1), (found.second, N2)):
        assert axis.counts.shape == (HEADS, places)
        assert int(axis.counts.sum()) == int(found.counts.sum())
    assert torch.equal(found.first.counts.sum(0), found.counts.view(N1, N2).sum(1))
    assert torch.equal(found.second.counts.sum(0), found.counts.view(N1, N2).sum(0))
    by_head = acting.unflatten(-1, (HEADS, K)).sum((0, 1, 3))
    assert torch.equal(found.first.counts.sum(1), by_head)
    assert found.unevenness == pytest.approx(float(unevenness(wanted)))
    assert found.used == pytest.approx(float((wanted != 0).double().mean()))
    assert torch.equal(found.dead, (found.counts == 0).nonzero().flatten())


def test_padding_is_not_counted() -> None:
    peer, x = neuron_layer(), tokens(2, 6)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 2:] = False
    with usage(peer) as padded:
        peer(x, mask)
    with usage(peer) as alone:
        peer(x[:1])
        peer(x[1:, :2])
    both = padded["layer"], alone["layer"]
    assert both[0].tokens == both[1].tokens == 8
    assert torch.equal(both[0].counts, both[1].counts)
    assert both[0].coverage is not None and both[1].coverage is not None
    torch.testing.assert_close(both[0].coverage, both[1].coverage, rtol=1e-5, atol=0)


def test_coverage_is_the_mean_over_tokens_and_is_measured_on_request() -> None:
    peer, x = neuron_layer(), tokens(2, 6)
    with usage(peer) as meter, usage(peer, detail=False) as without:
        peer(x)
    found = peer.router.retrieve(x, Condition(), detail=True).coverage
    assert found is not None and meter["layer"].coverage is not None
    torch.testing.assert_close(meter["layer"].coverage, found.double().mean((0, 1)))
    with usage(peer, detail=False) as without:
        peer(x)
    assert without["layer"].coverage is None


def test_a_block_ends_and_outputs_stay_the_same() -> None:
    peer, x = neuron_layer(), tokens(2, 6)
    plain = peer(x)
    with usage(peer) as meter:
        assert torch.equal(peer(x), plain)
    peer(x)
    assert meter["layer"].tokens == 12 and not peer.router.observers


def test_a_checkpointed_layer_counts_once() -> None:
    peer, x = neuron_layer().train(), tokens(2, 6).requires_grad_()
    for reentrant in (True, False):
        with usage(peer) as meter:
            checkpoint(peer, x, use_reentrant=reentrant).sum().backward()  # type: ignore[union-attr]
        assert meter["layer"].tokens == 12


class _Sizes(TorchDispatchMode):
    """The largest tensor that any operation makes or changes, but those that change a counter in place."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and "index_add_" not in str(func) and not func.is_view:
            self.largest = max(self.largest, out.numel())
        return out


def test_a_pass_costs_what_it_touched_and_not_the_table() -> None:
    peer, x = neuron_layer(4, (128, 128), heads=1, top_k=2, dim_key=4), tokens(1, 3, d=4)
    with usage(peer) as meter, torch.no_grad():
        found, counted = peer.router.retrieve(x, Condition(), detail=True), None
        with _Sizes() as sizes:
            meter.meter("layer")(found, counted)
    assert 0 < sizes.largest <= 32, "six retrievals, a table of 16384"
    assert int(meter["layer"].counts.sum()) == 6


def test_counts_are_saved_and_go_on() -> None:
    peer, x = neuron_layer(), tokens(2, 6)
    with usage(peer) as meter:
        peer(x)
    other = UsageMeter(peer)
    other.load_state_dict(meter.state_dict())
    peer(x)
    other.detach()
    assert torch.equal(other["layer"].counts, 2 * meter["layer"].counts)
    assert other["layer"].tokens == 24
    other.clear()
    assert other["layer"].tokens == 0 and not other["layer"].counts.any()
    with pytest.raises(ValueError, match="no site 'there'; there are layer"):
        other.meter("there")


def test_fallbacks_are_counted_as_what_they_do() -> None:
    peer, x = neuron_layer(), tokens(2, 6)
    router = peer.router
    peer.router = AdaptiveRouter(router, 0.3, 8)
    with usage(peer) as meter:
        peer(x)
    routing = peer.router(x, Condition())
    assert int(meter["layer"].counts.sum()) == int((routing.weights != 0).sum())
    peer.router = WideningRouter(router, torch.full((HEADS,), 2.0), 2 * K)
    with usage(peer) as meter:
        peer.router(x, Condition())
    assert int(meter["layer"].counts.sum()) == 12 * HEADS * 2 * K
    assert meter["layer"].flagged is not None and meter["layer"].flagged.tolist() == [1.0] * HEADS
    peer.router = LeaningRouter(router, torch.full((HEADS,), 2.0))
    with usage(peer) as meter:
        routing = peer.router(x, Condition())
    assert int(meter["layer"].counts.sum()) == 12 * HEADS * K
    assert meter["layer"].leaning == pytest.approx(float(routing.weights[..., -1].detach().mean()))
