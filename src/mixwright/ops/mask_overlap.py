"""How much masks overlap, smoothly: what pushes experts apart."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mixwright.ops.hard_concrete import DEAD

_CHUNK = 1 << 16


def expected_overlap(logits: Float[Tensor, " experts *units"]) -> Float[Tensor, "experts experts"]:
    """mean_j q_mj q_nj of each two experts, q = sigmoid(L - DEAD) as in `hard_concrete.expected_l0`.

    The share of units on which both act, where each mask is drawn by itself: for independent ones q_m q_n of their
    means; the diagonal is the mean of q^2. Float32, or float64 of float64. Smooth everywhere. Nothing of the logits'
    size is kept for the gradient but the logits.
    """
    return _ExpectedOverlap.apply(logits)  # type: ignore[no-any-return]


def expected_overlap_plain(logits: Float[Tensor, " experts *units"]) -> Float[Tensor, "experts experts"]:
    """The formula as it stands, by autograd: what `expected_overlap` is tested against."""
    q = _acting(logits.reshape(logits.shape[0], logits.shape[1:].numel()))
    return q @ q.T / max(q.shape[1], 1)


def _acting(rows: Tensor) -> Tensor:
    return torch.sigmoid(rows.to(torch.promote_types(rows.dtype, torch.float32)) - DEAD)


class _ExpectedOverlap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        rows = logits.reshape(logits.shape[0], logits.shape[1:].numel())
        with torch.autocast(logits.device.type, enabled=False):
            total = torch.zeros(
                (len(rows), len(rows)), dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device
            )
            for chunk in rows.split(_CHUNK, 1):
                q = _acting(chunk)
                total += q @ q.T
        return total / max(rows.shape[1], 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """q'_mj sum_n (g_mn + g_nm) q_nj / units."""
        (logits,) = ctx.saved_tensors
        rows = logits.reshape(logits.shape[0], logits.shape[1:].numel())
        both = (grad + grad.T) / max(rows.shape[1], 1)
        if torch.is_grad_enabled():
            q = _acting(rows)
            return (q * (1.0 - q) * (both @ q)).to(logits.dtype).view_as(logits)
        out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        with torch.autocast(logits.device.type, enabled=False):
            for chunk, into in zip(rows.split(_CHUNK, 1), out.split(_CHUNK, 1), strict=True):
                q = _acting(chunk)
                into.copy_((both @ q).mul_(q).mul_(1.0 - q))
        return out.view(logits.shape)
