"""The passes over masks by their compiled twins: each logit is read once, and nothing of their size is made but grads.

They take a mask per weight, on the CPU, in float32, contiguous. Where they don't fit, or are not to be had, each
function returns None, and its caller goes torch's own way.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from mixwright.ops import kernels

_CHUNK = 1 << 14
"""Weights whose sums one thread adds up: a function of nothing, so that results don't depend on threads."""
MOST_EPISODES = 8
"""Episodes of one pass over the masks, as native/interpolate.c has it; more take several."""


def interpolated(base: Tensor, delta: Tensor, logits: Tensor, scale: Tensor) -> list[Tensor] | None:
    """`base` + sum_m scale_em mask(logits_m) `delta`, for each e of scale (episodes, experts)."""
    native = kernels.kernel() if logits.shape[1:] == base.shape and _lie(base, delta, logits, scale) else None
    if native is None:
        return None
    outs = [torch.empty_like(base) for _ in scale]
    for at in range(0, len(outs), MOST_EPISODES):
        part = scale[at : at + MOST_EPISODES]
        places, pointers = _places(outs[at : at + MOST_EPISODES]), (t.data_ptr() for t in (base, delta, logits, part))
        native.interpolate(places, *pointers, *part.shape, base.numel())
    return outs


def gradients(
    delta: Tensor, logits: Tensor, scale: Tensor, grads: Sequence[Tensor], regrowth: float, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor] | None:
    """Gradients of delta and logits, as far as `wanted`, and of scale (episodes, experts), from those of all outs."""
    grads = [grad.contiguous() for grad in grads]
    native = kernels.kernel() if logits.shape[1:] == delta.shape and _lie(delta, logits, scale, *grads) else None
    if native is None:
        return None
    units, found = delta.numel(), list[tuple[Tensor | None, Tensor | None, Tensor]]()
    for at in range(0, len(grads), MOST_EPISODES):
        part, to_delta = scale[at : at + MOST_EPISODES], torch.empty_like(delta) if wanted[0] else None
        to_logits = torch.empty_like(logits) if wanted[1] else None
        sums = torch.empty((-(-units // _CHUNK), *part.shape), dtype=torch.float64)
        asked = (0 if tensor is None else tensor.data_ptr() for tensor in (to_delta, to_logits))
        places, pointers = _places(grads[at : at + MOST_EPISODES]), (t.data_ptr() for t in (delta, logits, part))
        native.interpolate_backward(*asked, sums.data_ptr(), places, *pointers, *part.shape, units, _CHUNK, regrowth)
        found.append((to_delta, to_logits, sums.sum(0).float()))
    to_deltas, to_logits_of, to_scale = zip(*found, strict=True)
    return _summed(to_deltas), _summed(to_logits_of), torch.cat(to_scale)


def mask_sums(logits: Tensor, *, expected: bool) -> tuple[Tensor, Tensor] | None:
    """For each expert, the sum of sigmoid(L - DEAD), or 0 if that is not asked for, and how many masks are not 0."""
    native = kernels.kernel() if _lie(logits) else None
    if native is None:
        return None
    experts, units = logits.shape[0], logits[:1].numel()
    sums = torch.zeros((-(-units // _CHUNK), experts), dtype=torch.float64)
    counts = torch.empty(sums.shape, dtype=torch.int64)
    place = sums.data_ptr() if expected else 0
    native.mask_sums(place, counts.data_ptr(), logits.data_ptr(), experts, units, _CHUNK)
    return sums.sum(0).float(), counts.sum(0)


def expected_l0_backward(logits: Tensor, slopes: Tensor) -> Tensor | None:
    """slopes_m sigmoid'(L - DEAD)."""
    native = kernels.kernel() if _lie(logits, slopes) else None
    if native is None:
        return None
    found = torch.empty_like(logits)
    places = (tensor.data_ptr() for tensor in (found, logits, slopes))
    native.expected_l0_backward(*places, logits.shape[0], logits[:1].numel())
    return found


def _lie(*tensors: Tensor) -> bool:
    return all(t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in tensors)


def _places(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _summed(parts: Sequence[Tensor | None]) -> Tensor | None:
    first, *rest = parts
    for part in rest:
        assert first is not None and part is not None
        first += part
    return first
