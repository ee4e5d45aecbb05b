"""Gates folded into projectors: the same stream, one affine map a component, and given up where it would not hold."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixwright.experts.blocks import BlockExperts
from mixwright.experts.projectors import Affine
from mixwright.routers.mixture_weights import MixtureWeights
from mixwright.routing import Condition

WIDTHS, B, T = (6, 4, 5), 2, 7


def block(kind: Any = "linear", widths: tuple[int, ...] = WIDTHS) -> BlockExperts:
    torch.manual_seed(1)
    return BlockExperts(lambda m, x: torch.tanh(x * (m + 1.0)), widths, kind)  # type: ignore[operator]


def row() -> MixtureWeights:
    weights = MixtureWeights(len(WIDTHS))
    weights.set(torch.tensor([0.5, 0.2, 0.3]))
    return weights


def stream() -> Tensor:
    return torch.randn(B, T, max(WIDTHS), generator=torch.Generator().manual_seed(2))


class Calls:
    """Runs a block without gradients and says how often a projector was called by itself."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, plain = 0, Affine.forward

        def counted(projector: Affine, x: Tensor) -> Tensor:
            self.count += 1
            return plain(projector, x)

        monkeypatch.setattr(Affine, "forward", counted)

    @torch.no_grad()
    def run(self, experts: BlockExperts, weights: MixtureWeights, x: Tensor | None = None) -> tuple[Tensor, int]:
        self.count, x = 0, stream() if x is None else x
        return experts(x, weights(x, Condition()), Condition()), self.count


def reference(experts: BlockExperts, weights: MixtureWeights, x: Tensor | None = None) -> Tensor:
    x = stream() if x is None else x
    with torch.enable_grad():
        return experts(x, weights(x, Condition()), Condition()).detach()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.mark.parametrize("kind", ["linear", "identity", "least_squares"])
@pytest.mark.parametrize("width", [max(WIDTHS), 4])
def test_folded_is_the_plain_path(kind: str, width: int, calls: Calls) -> None:
    experts, weights, x = block(kind), row(), stream()[..., :width]
    found, count = calls.run(experts, weights, x)
    assert count == 0, "the gates were not folded"
    expected = reference(experts, weights, x)
    assert calls.count == 6, "with gradients, projectors are called"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


CHANGES: dict[str, Callable[[BlockExperts, MixtureWeights], object]] = {
    "weight in place": lambda e, w: e.enter[1].weight.mul_(2),  # type: ignore[operator,union-attr]
    "bias in place": lambda e, w: e.leave[2].bias.add_(1),  # type: ignore[operator,union-attr]
    "parameter replaced": lambda e, w: setattr(e.enter[0], "weight", nn.Parameter(torch.ones(6, 6))),
    "data replaced": lambda e, w: setattr(e.leave[0].weight, "data", torch.ones(6, 6)),
    "projector replaced": lambda e, w: e.enter.__setitem__(0, Affine(6, 6)),
    "logits": lambda e, w: w.logits.copy_(torch.tensor([0.1, 2.0, 0.3])),
    "a component forbidden": lambda e, w: w.allowed.copy_(torch.tensor([True, False, True])),
    "temperature": lambda e, w: w.temperature.fill_(0.3),
    "a cast": lambda e, w: e.double().float(),
    "loaded": lambda e, w: e.load_state_dict({n: t + 1 for n, t in e.state_dict().items()}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(change: Callable[[BlockExperts, MixtureWeights], object], calls: Calls) -> None:
    experts, weights = block(), row()
    before, _ = calls.run(experts, weights)
    again, count = calls.run(experts, weights)
    assert torch.equal(before, again) and count == 0
    with torch.no_grad():
        change(experts, weights)
    after, count = calls.run(experts, weights)
    assert count == 0
    torch.testing.assert_close(after, reference(experts, weights), rtol=1e-5, atol=1e-6)


def test_maps_are_made_once_and_forgotten_when_something_is_learned(calls: Calls) -> None:
    experts, weights = block(), row()
    calls.run(experts, weights)
    held = experts.folded._seen
    calls.run(experts, weights)
    assert held is not None and experts.folded._seen is held
    reference(experts, weights)
    assert experts.folded._seen is None
    weights.requires_grad_(False)
    out = experts(stream(), weights(stream(), Condition()), Condition())
    assert out.requires_grad and experts.folded._seen is None, "projectors are learned"
    calls.run(experts, weights)
    assert copy.deepcopy(experts).folded._seen is None


def test_projectors_that_are_watched_are_called(calls: Calls) -> None:
    experts, weights = block(), row()
    seen: list[Tensor] = []
    handle = experts.enter[0].register_forward_hook(lambda _, args, out: seen.append(out))
    watched, count = calls.run(experts, weights)
    assert len(seen) == 1 and count == 6
    handle.remove()
    plain, count = calls.run(experts, weights)
    assert len(seen) == 1 and count == 0
    torch.testing.assert_close(plain, watched, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["mlp", "none"])
def test_others_stay_as_they_are(kind: str, calls: Calls) -> None:
    experts, weights = block(kind), row()
    assert torch.equal(calls.run(experts, weights)[0], reference(experts, weights))
    assert experts.folded._seen is None


def test_inference_mode_leaves_nothing_that_training_cannot_use(calls: Calls) -> None:
    experts, weights = block(), row()
    with torch.inference_mode():
        found = experts(stream(), weights(stream(), Condition()), Condition())
    assert calls.count == 0
    torch.testing.assert_close(calls.run(experts, weights)[0], found.clone())
    experts(stream(), weights(stream(), Condition()), Condition()).sum().backward()
    assert weights.logits.grad is not None


def test_autocast_is_not_folded(calls: Calls) -> None:
    experts, weights = block(), row()
    with torch.autocast("cpu", torch.bfloat16):
        assert calls.run(experts, weights)[1] == 6
