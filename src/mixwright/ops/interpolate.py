"""Adapted parameters between the pretrained ones and those a shared change leads to, weight by weight.

theta = theta_pre + strength c delta, c = sum_m alpha_m z_m (Chen et al. 2024, section 3): with masks z in [0, 1] and
routing weights that sum to 1, each c is where on the way from theta_pre (0) to theta_pre + delta (1) a weight stands.
The merge is linear in each of alpha, z and delta, so its gradient needs theta's gradient g and nothing of the forward
pass: d delta = c g, d alpha_m = <g delta, z_m>, d L_m = alpha_m z'_m g delta. Masks are made again where they are
needed, a chunk at a time; autograd's own form keeps about five tensors of the size of all masks.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mixwright.ops.hard_concrete import mask, slope_at

CHUNK = 1 << 15
"""Weights that are interpolated at a time."""


def interpolate(
    base: Float[Tensor, "*shape"],
    delta: Float[Tensor, "*shape"],
    logits: Float[Tensor, " experts *unit"],
    weights: Float[Tensor, " experts"],
    strength: float = 1.0,
) -> Float[Tensor, "*shape"]:
    """`base` + `strength` sum_m weights_m mask(logits_m) `delta`, in `base`'s dtype, with gradients for all tensors.

    Each expert's logits are of `base`'s shape (a mask per weight), of its first axis (per row) or of no axes (per
    tensor). Computed in float32, of float64 in float64. Where nothing is added, `base`'s own bits stand.
    """
    unit = tuple(logits.shape[1:])
    if unit not in ((), tuple(base.shape[:1]), tuple(base.shape)):
        raise ValueError(
            f"logits of {tuple(logits.shape)} are masks of {unit}, but the parameter is {tuple(base.shape)}; give each "
            "expert a logit per weight, per row of the first axis, or a single one."
        )
    return _Interpolate.apply(base, delta, logits, weights, strength)  # type: ignore[no-any-return]


def interpolate_plain(
    base: Float[Tensor, "*shape"],
    delta: Float[Tensor, "*shape"],
    logits: Float[Tensor, " experts *unit"],
    weights: Float[Tensor, " experts"],
    strength: float = 1.0,
) -> Float[Tensor, "*shape"]:
    """The formula as it stands, by autograd: what `interpolate` is tested against. -0.0 + 0 is 0.0 here."""
    dtype = _dtype(base, delta, logits)
    coefficients = coefficient(logits.to(dtype), weights.to(dtype))
    change = strength * _over(coefficients, base) * delta.to(dtype)
    return (base.to(dtype) + change).to(base.dtype)


def coefficient(logits: Float[Tensor, " experts *unit"], weights: Float[Tensor, " experts"]) -> Float[Tensor, "*unit"]:
    """c = sum_m weights_m mask(logits_m)."""
    return torch.einsum("m, m ... -> ...", weights, mask(logits))


def _dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _over(units: Tensor, parameter: Tensor) -> Tensor:
    """Values per unit, ready to broadcast over `parameter`."""
    return units.view((*units.shape, *[1] * (parameter.ndim - units.ndim)))


class _Interpolate(torch.autograd.Function):
    """`interpolate_plain`, and its gradient from theta's alone."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, delta: Tensor, logits: Tensor, weights: Tensor, strength: float) -> Tensor:
        ctx.save_for_backward(base, delta, logits, weights)
        ctx.strength = strength
        with torch.autocast(base.device.type, enabled=False):
            return interpolated(base, delta, logits, weights, strength)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad
        with torch.autocast(grad.device.type, enabled=False):
            if torch.is_grad_enabled():
                return _graphed(tensors, ctx.strength, grad, wanted)
            base, delta, logits, weights = tensors
            found = gradients(delta, logits, weights, ctx.strength, grad, wanted[1:4])
            return grad.to(base.dtype) if wanted[0] else None, *found, None


def interpolated(base: Tensor, delta: Tensor, logits: Tensor, weights: Tensor, strength: float) -> Tensor:
    """`interpolate`'s value."""
    dtype = _dtype(base, delta, logits)
    scale, masked = strength * weights.to(dtype), _units(logits)
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    into, before, change = (_by_unit(tensor, masked) for tensor in (out, base, delta))
    for rows, parts in _blocks(*change.shape):
        c = (scale @ mask(masked[:, rows]).to(dtype))[:, None]
        for columns in parts:
            was, step = before[rows, columns], c * change[rows, columns].to(dtype)
            moved = (was.to(dtype) + step).to(base.dtype)
            torch.where((step == 0) | (c == 0), was, moved, out=into[rows, columns])
    # A model in another memory format goes on in it: its convolutions would choose other sums.
    return out if base.is_contiguous() else torch.empty_like(base).copy_(out)


def gradients(
    delta: Tensor, logits: Tensor, weights: Tensor, strength: float, grad: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of delta, logits and weights, as far as `wanted`, from `grad`, that of the adapted parameter."""
    dtype = _dtype(grad, delta, logits)
    weights_, masked = strength * weights.to(dtype), _units(logits)
    to_delta = torch.empty_like(delta, memory_format=torch.contiguous_format) if wanted[0] else None
    to_logits = torch.empty_like(masked, memory_format=torch.contiguous_format) if wanted[1] else None
    to_weights = torch.zeros_like(weights_)
    given, change = (_by_unit(tensor, masked) for tensor in (grad, delta))
    filled = None if to_delta is None else _by_unit(to_delta, masked)
    for rows, parts in _blocks(*change.shape):
        z = mask(masked[:, rows]).to(dtype)
        c, to_c = (weights_ @ z)[:, None], torch.zeros_like(z[0])
        for columns in parts:
            g = given[rows, columns].to(dtype)
            if filled is not None:
                filled[rows, columns] = g * c
            to_c += (g * change[rows, columns].to(dtype)).sum(1)
        to_weights += z @ to_c
        if to_logits is not None:
            to_logits[:, rows] = slope_at(z) * to_c * weights_[:, None]
    found = None if to_logits is None else to_logits.view(logits.shape)
    return to_delta, found, (strength * to_weights).to(weights.dtype) if wanted[2] else None


def _units(logits: Tensor) -> Tensor:
    return logits.reshape(logits.shape[0], logits.shape[1:].numel())


def _by_unit(tensor: Tensor, masked: Tensor) -> Tensor:
    """`tensor` as (units, what each holds)."""
    units = masked.shape[1]
    return tensor.reshape(units, tensor.numel() // max(units, 1))


def _blocks(units: int, width: int) -> Iterator[tuple[slice, list[slice]]]:
    """Units that are taken together, with the columns of what they hold that are."""
    high = max(1, CHUNK // max(width, 1))
    columns = [slice(left, left + CHUNK) for left in range(0, width, CHUNK)]
    return ((slice(top, top + high), columns) for top in range(0, units, high))


def _graphed(
    tensors: Sequence[Tensor], strength: float, grad: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients with a graph of their own, for whoever differentiates them again."""
    base, delta, logits, weights = tensors
    chosen = [tensor for tensor, asked in zip(tensors, wanted, strict=False) if asked]
    plain = interpolate_plain(base, delta, logits, weights, strength)
    found = iter(torch.autograd.grad(plain, chosen, grad, create_graph=True))
    return tuple(next(found) if asked else None for asked in wanted)
