"""The passes over masks by their compiled twins: each logit is read once, and nothing of their size is made but grads.

They take a mask per weight, on the CPU, in float32, contiguous. Where they don't fit, or are not to be had, each
function returns None, and its caller goes torch's own way.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mixwright.ops import kernels

_CHUNK = 1 << 14
"""Weights whose sums one thread adds up: a function of nothing, so that results don't depend on threads."""


def interpolated(base: Tensor, delta: Tensor, logits: Tensor, scale: Tensor) -> Tensor | None:
    """`base` + sum_m scale_m mask(logits_m) `delta`."""
    native = kernels.kernel() if logits.shape[1:] == base.shape and _lie(base, delta, logits, scale) else None
    if native is None:
        return None
    out = torch.empty_like(base)
    pointers = (tensor.data_ptr() for tensor in (out, base, delta, logits, scale))
    native.interpolate(*pointers, logits.shape[0], base.numel())
    return out


def gradients(
    delta: Tensor, logits: Tensor, scale: Tensor, grad: Tensor, regrowth: float, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor] | None:
    """Gradients of delta and logits, as far as `wanted`, and of scale."""
    grad = grad.contiguous()
    native = kernels.kernel() if logits.shape[1:] == delta.shape and _lie(delta, logits, scale, grad) else None
    if native is None:
        return None
    to_delta = torch.empty_like(delta) if wanted[0] else None
    to_logits = torch.empty_like(logits) if wanted[1] else None
    units, experts = delta.numel(), logits.shape[0]
    sums = torch.empty((-(-units // _CHUNK), experts), dtype=torch.float64)
    places = (0 if tensor is None else tensor.data_ptr() for tensor in (to_delta, to_logits))
    pointers = (tensor.data_ptr() for tensor in (sums, grad, delta, logits, scale))
    native.interpolate_backward(*places, *pointers, experts, units, _CHUNK, regrowth)
    return to_delta, to_logits, sums.sum(0).float()


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
