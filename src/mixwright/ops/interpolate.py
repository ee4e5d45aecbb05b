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

from mixwright.ops import mask_kernels
from mixwright.ops.hard_concrete import concrete_noise, mask, slope_at

CHUNK = 1 << 15
"""Weights that are interpolated at a time, as many as a CPU's cache holds the masks of."""
GPU_CHUNK = 1 << 20
"""The same on a GPU, where the work of starting counts."""


def interpolate(
    base: Float[Tensor, "*shape"],
    delta: Float[Tensor, "*shape"],
    logits: Float[Tensor, " experts *unit"],
    weights: Float[Tensor, " experts"],
    strength: float = 1.0,
    *,
    noise: int | None = None,
    regrowth: float = 0.0,
) -> Float[Tensor, "*shape"]:
    """`base` + `strength` sum_m weights_m mask(logits_m) `delta`, in `base`'s dtype, with gradients for all tensors.

    Each expert's logits are of `base`'s shape (a mask per weight), of its first axis (per row) or of no axes (per
    tensor). Computed in float32, of float64 in float64. Where nothing is added, `base`'s own bits stand. `noise`: the
    seed of concrete noise on the logits, as Louizos et al. train; None is none. `regrowth`: the slope with which masks
    at either end still feel the gradient, in place of 0, so that those which died can come back.
    """
    return interpolate_each(base, delta, logits, weights[None], strength, noise=noise, regrowth=regrowth)[0]


def interpolate_each(
    base: Float[Tensor, "*shape"],
    delta: Float[Tensor, "*shape"],
    logits: Float[Tensor, " experts *unit"],
    weights: Float[Tensor, "episodes experts"],
    strength: float = 1.0,
    *,
    noise: int | None = None,
    regrowth: float = 0.0,
) -> tuple[Float[Tensor, "*shape"], ...]:
    """`interpolate` for several episodes, each with weights of its own: masks are made once for all of them, and once
    more for their gradients. `noise` is drawn once for all.
    """
    unit = tuple(logits.shape[1:])
    if unit not in ((), tuple(base.shape[:1]), tuple(base.shape)):
        raise ValueError(
            f"logits of {tuple(logits.shape)} are masks of {unit}, but the parameter is {tuple(base.shape)}; give each "
            "expert a logit per weight, per row of the first axis, or a single one."
        )
    return _Interpolate.apply(base, delta, logits, weights, strength, noise, regrowth)  # type: ignore[no-any-return]


def interpolate_plain(
    base: Float[Tensor, "*shape"],
    delta: Float[Tensor, "*shape"],
    logits: Float[Tensor, " experts *unit"],
    weights: Float[Tensor, " experts"],
    strength: float = 1.0,
    *,
    noise: int | None = None,
) -> Float[Tensor, "*shape"]:
    """The formula as it stands, by autograd: what `interpolate` is tested against. -0.0 + 0 is 0.0 here."""
    dtype = _dtype(base, delta, logits)
    if noise is not None:
        logits = logits.to(dtype) + _noise_over(base, logits, noise)
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
    """`interpolate_plain` of each episode, and their gradient from the adapted parameters' alone."""

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        delta: Tensor,
        logits: Tensor,
        weights: Tensor,
        strength: float,
        noise: int | None,
        regrowth: float,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(base, delta, logits, weights)
        ctx.how = strength, noise, regrowth
        with torch.autocast(base.device.type, enabled=False):
            return tuple(_interpolated(base, delta, logits, weights, strength, noise))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        base, delta, logits, weights = ctx.saved_tensors
        (strength, noise, regrowth), wanted = ctx.how, ctx.needs_input_grad
        with torch.autocast(grads[0].device.type, enabled=False):
            if torch.is_grad_enabled():
                plain = [interpolate_plain(base, delta, logits, each, strength, noise=noise) for each in weights]
                return *_graphed(plain, (base, delta, logits, weights), grads, wanted[:4]), None, None, None
            found = _gradients(delta, logits, weights, strength, noise, regrowth, grads, wanted[1:4])
            to_base = sum(grads[1:], start=grads[0]).to(base.dtype) if wanted[0] else None
            return to_base, *found, None, None, None


def _interpolated(
    base: Tensor, delta: Tensor, logits: Tensor, weights: Tensor, strength: float, noise: int | None
) -> list[Tensor]:
    """`interpolate_each`'s values."""
    dtype = _dtype(base, delta, logits)
    scale, masked = strength * weights.to(dtype), _units(logits)
    found = None if noise is not None else mask_kernels.interpolated(base, delta, logits, scale)
    if found is not None:
        return found
    outs = [torch.empty_like(base, memory_format=torch.contiguous_format) for _ in weights]
    before, change, *into = (_by_unit(tensor, masked) for tensor in (base, delta, *outs))
    for rows, parts, seen in _blocks(masked, change.shape[1], noise):
        coefficients = scale @ mask(seen).to(dtype)
        for columns in parts:
            was, whole = before[rows, columns], change[rows, columns].to(dtype)
            for c, out in zip(coefficients[:, :, None], into, strict=True):
                step = c * whole
                moved = (was.to(dtype) + step).to(base.dtype)
                torch.where((step == 0) | (c == 0), was, moved, out=out[rows, columns])
    # A model in another memory format goes on in it: its convolutions would choose other sums.
    return outs if base.is_contiguous() else [torch.empty_like(base).copy_(out) for out in outs]


def _gradients(
    delta: Tensor,
    logits: Tensor,
    weights: Tensor,
    strength: float,
    noise: int | None,
    regrowth: float,
    grads: Sequence[Tensor],
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of delta, logits and weights, as far as `wanted`, from `grads`, those of the adapted parameters."""
    dtype = _dtype(grads[0], delta, logits)
    scale, masked = strength * weights.to(dtype), _units(logits)
    native = None if noise is not None else mask_kernels.gradients(delta, logits, scale, grads, regrowth, wanted)
    if native is not None:
        return *native[:2], (strength * native[2]).to(weights.dtype) if wanted[2] else None
    to_delta = torch.empty_like(delta, memory_format=torch.contiguous_format) if wanted[0] else None
    to_logits = torch.empty_like(masked, memory_format=torch.contiguous_format) if wanted[1] else None
    to_weights = torch.zeros_like(scale)
    change, *given = (_by_unit(tensor, masked) for tensor in (delta, *grads))
    filled = None if to_delta is None else _by_unit(to_delta, masked)
    for rows, parts, seen in _blocks(masked, change.shape[1], noise):
        z = mask(seen).to(dtype)
        coefficients = scale @ z
        to_c = torch.zeros_like(coefficients)
        for columns in parts:
            whole = change[rows, columns].to(dtype)
            total = torch.zeros_like(whole)
            for c, felt, grad in zip(coefficients, to_c, given, strict=True):
                g = grad[rows, columns].to(dtype)
                total += g * c[:, None]
                felt += (g * whole).sum(1)
            if filled is not None:
                filled[rows, columns] = total
        to_weights += to_c @ z.T
        if to_logits is not None:
            to_logits[:, rows] = slope_at(z, regrowth).mul_(scale.T @ to_c)
    found = None if to_logits is None else to_logits.view(logits.shape)
    return to_delta, found, (strength * to_weights).to(weights.dtype) if wanted[2] else None


def _units(logits: Tensor) -> Tensor:
    return logits.reshape(logits.shape[0], logits.shape[1:].numel())


def _by_unit(tensor: Tensor, masked: Tensor) -> Tensor:
    """`tensor` as (units, what each holds)."""
    units = masked.shape[1]
    return tensor.reshape(units, tensor.numel() // max(units, 1))


def _blocks(masked: Tensor, width: int, noise: int | None) -> Iterator[tuple[slice, list[slice], Tensor]]:
    """Units that are taken together, the columns of what they hold that are, and their logits, with noise if any."""
    chunk = CHUNK if masked.device.type == "cpu" else GPU_CHUNK
    high = max(1, chunk // max(width, 1))
    columns = [slice(left, left + chunk) for left in range(0, width, chunk)]
    draw = None if noise is None else torch.Generator(masked.device).manual_seed(noise)
    for top in range(0, masked.shape[1], high):
        rows = slice(top, top + high)
        seen = masked[:, rows]
        yield rows, columns, seen if draw is None else seen + concrete_noise(seen, draw)


def _noise_over(base: Tensor, logits: Tensor, noise: int) -> Tensor:
    """The noise that `interpolate` adds to these logits."""
    still = torch.zeros_like(_units(logits), dtype=_dtype(logits))
    drawn = [seen for _, _, seen in _blocks(still, _by_unit(base, still).shape[1], noise)]
    return torch.cat(drawn, 1).view(logits.shape) if drawn else still.view(logits.shape)


def _graphed(
    plain: Sequence[Tensor], tensors: Sequence[Tensor], grads: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients with a graph of their own, for whoever differentiates them again: the formula's, no regrowth."""
    chosen = [tensor for tensor, asked in zip(tensors, wanted, strict=True) if asked]
    found = iter(torch.autograd.grad(plain, chosen, grads, create_graph=True))
    return tuple(next(found) if asked else None for asked in wanted)


def added(
    base: Float[Tensor, "*shape"], change: Float[Tensor, "*shape"], strength: float = 1.0
) -> Float[Tensor, "*shape"]:
    """`base` + `strength` `change` in `base`'s dtype, where that is 0 `base`'s own bits; with gradients for both."""
    return _Added.apply(base, change, strength)  # type: ignore[no-any-return]


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, change: Tensor, strength: float) -> Tensor:
        ctx.how = base.dtype, change.dtype, strength
        dtype = _dtype(base, change)
        step = strength * change.to(dtype)
        return torch.where(step == 0, base, (base.to(dtype) + step).to(base.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        base, change, strength = ctx.how
        return grad.to(base), (strength * grad).to(change), None
