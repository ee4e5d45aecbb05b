"""Merging where every mask is 0 or 1: which experts act on a weight is one byte, and its coefficient one of 256 sums.

theta = theta_pre + strength c delta with c = sums[byte]: a byte for each weight is read in place of a logit for each
weight and expert. For up to 8 experts.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mixwright.ops import kernels
from mixwright.ops.hard_concrete import DEAD

MOST = 8
"""Experts that a byte has room for."""


def membership(logits: Float[Tensor, " experts *units"]) -> UInt8[Tensor, "*units"] | None:
    """Bit m of each byte: expert m's mask is 1. None where a mask is neither 0 nor 1, or there are more than 8."""
    if logits.shape[0] > MOST:
        return None
    codes = torch.zeros(logits.shape[1:], dtype=torch.uint8, device=logits.device)
    for expert, row in enumerate(logits.detach()):
        alive = row >= -DEAD
        if bool((~alive & ~(row <= DEAD)).any()):
            return None
        codes |= alive.to(torch.uint8) << expert
    return codes


def sums_of(weights: Float[Tensor, " experts"]) -> Float[Tensor, " bytes"]:
    """For each byte the sum of the weights of its experts, added in their order: `interpolate`'s own bits."""
    members = torch.arange(256, device=weights.device)
    total = torch.zeros(256, dtype=weights.dtype, device=weights.device)
    for expert, weight in enumerate(weights):
        total += weight * (members >> expert & 1)
    return total


def interpolate_members(
    base: Float[Tensor, "*shape"],
    delta: Float[Tensor, "*shape"],
    codes: UInt8[Tensor, "*shape"],
    sums: Float[Tensor, " bytes"],
) -> Float[Tensor, "*shape"]:
    """`base` + sums[codes] `delta`, and `base`'s own bits where that adds nothing. No gradients."""
    tensors = (base, delta, codes, sums)
    out = torch.empty_like(base)
    native = kernels.kernel() if _fit(base, delta, sums) and all(t.is_contiguous() for t in tensors) else None
    if native is not None:
        native.interpolate_members(*(tensor.data_ptr() for tensor in (out, *tensors)), base.numel())
        return out
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    step = sums[codes.long()].to(wide) * delta.to(wide)
    return torch.where((step == 0) | (sums == 0)[codes.long()], base, (base.to(wide) + step).to(base.dtype), out=out)


def is_quick(*tensors: Tensor) -> bool:
    """Whether the table has a compiled path for these; without one it saves memory's traffic and nothing else."""
    return _fit(*tensors) and kernels.kernel() is not None


def _fit(*tensors: Tensor) -> bool:
    return all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
