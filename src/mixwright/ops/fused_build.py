"""Both factors of an adapted layer from their leaves, by the compiled twin of `build` where it fits.

At a few tokens most of a training step is the bookkeeping of many small operations: here both factors are one node of
autograd's graph, whose forward and backward are one call for each factor. What the twin doesn't take (another type or
device, a norm, a gradient of the gradient, no compiler) goes the plain way of `ops/tensor_product.py`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mixwright.ops import kernels
from mixwright.ops.tensor_product import Leaves, build

LARGEST = 1 << 18
"""Numbers that the twin may hold on its stack."""

_GROUP = 16
_PLACES = {2: (0, None, 1, None), 3: (0, None, 1, 2), 4: (0, 1, 2, 3)}
"""For each order, the leaves of the left half's two places and of the right half's."""


def build_factors(
    down: Leaves, up: Leaves, weights: Float[Tensor, "choices terms"], d_in: int, d_out: int, norm: bool = False
) -> tuple[Float[Tensor, "choices rank d_in"], Float[Tensor, "choices rank d_out"]]:
    """`build(down, weights, d_in)` and `build(up, weights, d_out)`."""
    if not norm and _fits(weights, down, up):
        native = kernels.kernel()
        if native is not None:
            return _Build.apply(native, (d_in, d_out), weights, *down, *up)  # type: ignore[no-any-return]
    return build(down, weights, d_in, norm), build(up, weights, d_out, norm)


class _Build(torch.autograd.Function):
    """`build` twice, with gradients, in C."""

    @staticmethod
    def forward(
        ctx: Any, native: kernels.Kernels, widths: tuple[int, int], weights: Tensor, *leaves: Tensor
    ) -> tuple[Tensor, ...]:
        half = len(leaves) // 2
        ctx.native, ctx.given, made = native, [], []
        for own, width in ((leaves[:half], widths[0]), (leaves[half:], widths[1])):
            rank = own[0].shape[-2]
            radices = [1 if place is None else own[place].shape[-1] for place in _PLACES[half]]
            sizes = (*weights.shape, rank, *radices, width, own[0].dim() == 4)
            given = (weights.data_ptr(), *_pointers(own), *sizes)
            made.append(out := weights.new_empty((weights.shape[0], rank, width)))
            native.build(out.data_ptr(), *given)
            ctx.given.append(given)
        ctx.save_for_backward(weights, *leaves)  # what the pointers point to stays as long as these do
        return tuple(made)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (nobody passes ctx by name)
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        weights, *leaves = ctx.saved_tensors
        half, groups = len(leaves) // 2, -(-leaves[0].shape[-2] // _GROUP)
        found = [torch.empty_like(leaf) for leaf in leaves]
        d_weights = weights.new_empty((2, groups, *weights.shape))
        for side, gradient, given, own in zip(
            d_weights, gradients, ctx.given, (found[:half], found[half:]), strict=True
        ):
            gradient = gradient.contiguous()
            ctx.native.build_backward(gradient.data_ptr(), side.data_ptr(), *_pointers(own), *given)
        return None, None, d_weights.sum((0, 1)), *found


def _pointers(leaves: Sequence[Tensor]) -> list[int]:
    """Of the leaves in their places; 0 for one that is not there."""
    return [0 if place is None else leaves[place].data_ptr() for place in _PLACES[len(leaves)]]


def _fits(weights: Tensor, down: Leaves, up: Leaves) -> bool:
    """Whether the twin takes these tensors as they lie."""
    if not (2 <= len(down) == len(up) <= 4 and weights.is_cpu and weights.numel()) or torch.compiler.is_compiling():
        return False
    for tensor in (weights, *down, *up):
        if tensor.dtype != torch.float32 or type(tensor) not in (Tensor, torch.nn.Parameter):
            return False
        if not tensor.is_contiguous() or not tensor.is_cpu:
            return False
    return max(_held(down), _held(up)) <= LARGEST


def _held(leaves: Leaves) -> int:
    """Numbers that the twin needs on its stack, about."""
    middle = len(leaves) // 2
    rows, columns = (math.prod(leaf.shape[-1] for leaf in half) for half in (leaves[:middle], leaves[middle:]))
    return _GROUP * (2 * (leaves[0].shape[-3] + 3) * (rows + columns + _GROUP) + _GROUP * columns)
