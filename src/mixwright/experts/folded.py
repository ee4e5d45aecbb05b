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
        self._seen: tuple[Members, list[int], torch.dtype, Maps, list[Tensor]] | None = None

    def __call__(self, enter: nn.ModuleList, leave: nn.ModuleList, members: Members, x: Tensor) -> Maps | None:
        """The maps for a stream like `x`; None where there is something to learn, to watch, or to decide per token.

        `members` must be the same list for as long as the weights are the same.
        """
        if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            self._seen = None
            return None
        key: list[int] = []
        sources: list[Tensor] = []
        for side in (enter, leave):
            for projector in side._modules.values():  # pyright: ignore[reportPrivateUsage]  (an index costs much more)
                if type(projector) is not Affine or _watched(projector):
                    return None
                for source in projector._parameters.values():  # pyright: ignore[reportPrivateUsage]
                    if source is None or source.is_inference():
                        return None
                    sources.append(source)
                    key += (id(source), source._version, source.data_ptr())  # pyright: ignore[reportPrivateUsage]
        seen = self._seen
        if seen is not None and seen[0] is members and seen[1] == key and seen[2] is x.dtype:
            return seen[3]
        if any(alpha is None or alpha.dim() != 1 or alpha.is_inference() for _, alpha in members):
            return None
        with torch.inference_mode(False), torch.no_grad():
            maps = _maps(enter, leave, members, x.dtype)
        held = [*sources, *(source.detach() for source in sources)]  # so that nothing new comes to lie at their places
        self._seen = (members, key, x.dtype, maps, held)
        return maps

    def __deepcopy__(self, memo: object) -> "Folded":
        return Folded()

    def __getstate__(self) -> dict[str, Any]:
        return {"_seen": None}


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
