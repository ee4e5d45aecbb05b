"""The gates of a hybrid's block folded into its projectors, while neither is being learned.

(1 - alpha) (W h + b) + alpha h is one affine map, ((1 - alpha) W + alpha I) h + (1 - alpha) b; and the mixture of what
leaves the components is one affine map of their outputs side by side.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from mixwright.experts.projectors import Affine

Members = list[tuple[int, Tensor | None]]
"""The components that act, each with its weights `(*decision, 1)`; None for one that acts alone at weight 1."""


class Maps(NamedTuple):
    """`enter`: component -> the map into it. `leave`: that from the outputs of all of them, side by side."""

    enter: tuple[tuple[int, Tensor, Tensor], ...]
    leave: tuple[Tensor, Tensor]

    def left(self, outputs: Sequence[Float[Tensor, "*batch _"]]) -> Float[Tensor, "*batch width"]:
        """The stream after the block."""
        return linear(torch.cat(list(outputs), -1), *self.leave)


class Folded:
    """The maps of a block, made again when a weight or a projector has changed. A copy starts without any."""

    def __init__(self) -> None:
        self._seen: _Seen | None = None

    def __call__(self, enter: nn.ModuleList, leave: nn.ModuleList, members: Members, x: Tensor) -> Maps | None:
        """The maps for a stream like `x`; None where there is something to learn, to watch, or to decide per token.

        `members` must be the same list for as long as the weights are the same.
        """
        if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            self._seen = None
            return None
        seen = self._seen
        if seen is not None and seen.members is members and seen.dtype is x.dtype and seen.holds(enter, leave):
            return seen.maps
        self._seen = None
        projectors = (*enter, *leave)
        sources = [source for projector in projectors for source in projector.parameters()]
        if any(type(projector) is not Affine or _watched(projector) for projector in projectors):
            return None
        if any(alpha is None or alpha.dim() != 1 or alpha.is_inference() for _, alpha in members):
            return None
        if any(source.is_inference() for source in sources):
            return None
        with torch.inference_mode(False), torch.no_grad():
            maps = _maps(enter, leave, members, x.dtype)
        held = tuple(source.detach() for source in sources)
        self._seen = _Seen(members, x.dtype, maps, projectors, tuple(sources), tuple(map(_state, sources)), held)
        return maps

    def __deepcopy__(self, memo: object) -> "Folded":
        return Folded()

    def __getstate__(self) -> dict[str, Any]:
        return {"_seen": None}


class _Seen(NamedTuple):
    """What maps were made of. `held`: the same storages, so that nothing new comes to lie at their places."""

    members: Members
    dtype: torch.dtype
    maps: Maps
    projectors: tuple[nn.Module, ...]
    sources: tuple[Tensor, ...]
    states: tuple[tuple[int, int], ...]
    held: tuple[Tensor, ...]

    def holds(self, enter: nn.ModuleList, leave: nn.ModuleList) -> bool:
        """Whether the projectors are the same, as they were, and nobody watches them."""
        at = 0
        for side in (enter, leave):
            for projector in side._modules.values():  # pyright: ignore[reportPrivateUsage]  (an index costs much more)
                if projector is not self.projectors[at // 2] or _watched(projector):
                    return False
                for source in projector._parameters.values():  # pyright: ignore[reportPrivateUsage]
                    if source is None or source is not self.sources[at] or _state(source) != self.states[at]:
                        return False
                    at += 1
        return True


def _state(source: Tensor) -> tuple[int, int]:
    """Changes with what is written to a tensor, and with where it lies."""
    return source._version, source.data_ptr()  # pyright: ignore[reportPrivateUsage]  (the only counter)


def _watched(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _maps(enter: nn.ModuleList, leave: nn.ModuleList, members: Members, dtype: torch.dtype) -> Maps:
    into: list[tuple[int, Tensor, Tensor]] = []
    out: list[tuple[Tensor, Tensor]] = []
    for m, alpha in members:
        assert alpha is not None
        weight, bias = _gate(enter[m], alpha)
        into.append((m, weight.to(dtype), bias.to(dtype)))
        weight, bias = _gate(leave[m], alpha)
        out.append((alpha.to(weight) * weight, alpha.to(bias) * bias))
    leaving = torch.cat([weight for weight, _ in out], 1), torch.stack([bias for _, bias in out]).sum(0)
    return Maps(tuple(into), (leaving[0].to(dtype), leaving[1].to(dtype)))


def _gate(projector: nn.Module, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """(1 - alpha) (W, b) + alpha (I, 0), in float32 at least."""
    assert isinstance(projector, Affine)
    wide = torch.promote_types(projector.weight.dtype, torch.float32)
    weight, bias = projector.weight.to(wide), projector.bias.to(wide)
    share = alpha.to(weight)
    return torch.lerp(weight, torch.eye(*weight.shape, dtype=wide, device=weight.device), share), (1 - share) * bias
