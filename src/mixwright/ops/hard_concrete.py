"""Masks that are exactly 0 or 1 at finite logits: the hard concrete map (Louizos et al. 2018), without its noise.

z(L) = min(1, max(0, sigmoid(L / beta) (zeta - gamma) + gamma)). ONE map for training, evaluation and storage: the
authors' released code evaluates with another temperature and so serves a denser model than the one it constrains.
Half precision is read in float32. In every dtype z is 0 exactly where L <= DEAD and 1 exactly where L >= -DEAD, so
that what counts logits and what counts weights agree.
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixwright.ops import mask_kernels

BETA, GAMMA, ZETA = 2.0 / 3.0, -0.1, 1.1
DEAD = BETA * math.log(-GAMMA / ZETA)
"""About -1.5986: at and below it the mask is 0, and no gradient comes through it."""
LIMIT = math.log(100.0)
"""Logits are held within +-LIMIT, so that none is too far away to come back."""

_LEAST = 2.0**-24
_CHUNK = 1 << 16


def mask(logits: Float[Tensor, "*units"]) -> Float[Tensor, "*units"]:
    """z of each logit; float32, or float64 of float64."""
    wide = _wide(logits)
    still = wide.detach()
    alive, free = _positive(still - DEAD), _positive(-DEAD - still)
    if torch.is_grad_enabled() and logits.requires_grad:
        partly = (torch.sigmoid(wide / BETA) * (ZETA - GAMMA) + GAMMA).clamp(_LEAST, 1.0 - _LEAST) * alive
    else:
        partly = (wide / BETA).sigmoid_().mul_(ZETA - GAMMA).add_(GAMMA).clamp_(_LEAST, 1.0 - _LEAST).mul_(alive)
    return torch.addcmul(partly, 1.0 - partly, free.neg_().add_(1.0))


def _positive(values: Tensor) -> Tensor:
    """1.0 where a number is above 0, else 0.0; NaN stays. A difference of floats is 0 only between equals."""
    return values.mul_(1e30).clamp_(0.0, 1.0)  # a quarter of what comparing and filling take on a CPU


def mask_slope(logits: Float[Tensor, "*units"]) -> Float[Tensor, "*units"]:
    """dz/dL: 0 at and beyond both ends."""
    return slope_at(mask(logits))


def slope_at(z: Float[Tensor, "*units"], at_ends: float = 0.0) -> Float[Tensor, "*units"]:
    """dz/dL where the mask is `z`: (z - gamma) (zeta - z) / (beta (zeta - gamma)) between the ends."""
    both = (1.0 - z) * z  # (z - gamma) (zeta - z) = both - gamma zeta, since gamma + zeta = 1
    between = _positive(both.detach().clone())
    slope = (both - GAMMA * ZETA) * between * (1.0 / (BETA * (ZETA - GAMMA)))
    return slope if at_ends == 0 else slope + at_ends * (1.0 - between)


def expected_l0(logits: Float[Tensor, " experts *units"]) -> Float[Tensor, " experts"]:
    """mean_j sigmoid(L_mj - DEAD) per expert: the share of masks that are not 0 where the concrete noise is drawn.

    Smooth everywhere, so a mask that is dead by `mask` still feels it. Nothing of the logits' size is kept for the
    gradient but the logits.
    """
    return _ExpectedL0.apply(logits)  # type: ignore[no-any-return]


def hard_count(logits: Float[Tensor, " experts *units"]) -> Int[Tensor, " experts"]:
    """How many masks of each expert are not exactly 0."""
    found = mask_kernels.mask_sums(logits, expected=False)
    if found is not None:
        return found[1]
    count = torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
    for chunk in logits.detach().reshape(logits.shape[0], -1).split(_CHUNK, 1):
        count += _positive(_wide(chunk) - DEAD).sum(1).long()
    return count


def concrete_noise(like: Float[Tensor, "*units"], generator: torch.Generator | None) -> Float[Tensor, "*units"]:
    """log u - log (1 - u), u uniform on (1e-6, 1 - 1e-6): what turns a logit into a draw of its mask when added."""
    u = torch.rand(like.shape, generator=generator, device=like.device, dtype=_dtype(like))
    return torch.logit(u, eps=1e-6)


def noisy_mask(logits: Float[Tensor, "*units"], generator: torch.Generator | None = None) -> Float[Tensor, "*units"]:
    """z(L + noise), as Louizos et al. train: P(z != 0) is `expected_l0`'s term, and dead masks are tried again."""
    return mask(_wide(logits) + concrete_noise(logits, generator))


def _wide(logits: Tensor) -> Tensor:
    return logits.to(_dtype(logits))


def _dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


class _ExpectedL0(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        rows = logits.reshape(logits.shape[0], -1)
        found = mask_kernels.mask_sums(logits, expected=True)
        if found is not None:
            return found[0] / max(rows.shape[1], 1)
        total = torch.zeros(len(rows), dtype=_dtype(logits), device=logits.device)
        for chunk in rows.split(_CHUNK, 1):
            total += torch.sigmoid(_wide(chunk) - DEAD).sum(1)
        return total / max(rows.shape[1], 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (logits,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            s = torch.sigmoid(_wide(logits) - DEAD)
            return _scaled(s * (1.0 - s), grad).to(logits.dtype)
        rows = logits.reshape(logits.shape[0], -1)
        found = mask_kernels.expected_l0_backward(logits, grad / max(rows.shape[1], 1))
        if found is not None:
            return found
        out = torch.empty_like(rows)
        for chunk, into in zip(rows.split(_CHUNK, 1), out.split(_CHUNK, 1), strict=True):
            s = torch.sigmoid(_wide(chunk) - DEAD)
            into.copy_(s.mul_(1.0 - s).mul_((grad / rows.shape[1])[:, None]))
        return out.view_as(logits)


def _scaled(slopes: Tensor, grad: Tensor) -> Tensor:
    units = max(slopes[:1].numel(), 1)
    return slopes * (grad / units).view(-1, *[1] * (slopes.ndim - 1))
