"""Both factors of an adapted layer from their leaves, by the compiled twin of `build` where it fits.

At a few tokens most of a training step is the bookkeeping of many small operations: here both factors are one node of
autograd's graph, whose forward and backward are one call for each factor. What the twin doesn't take (another type or
device, a norm, a gradient of the gradient, no compiler) goes the plain way of `ops/tensor_product.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mixwright.ops import kernels
from mixwright.ops.tensor_product import Leaves, build

LARGEST = 1 << 15
"""Numbers that the twin holds on its stack for one row of a factor."""


def build_factors(
    down: Leaves, up: Leaves, weights: Float[Tensor, "choices terms"], d_in: int, d_out: int, norm: bool = False
) -> tuple[Float[Tensor, "choices rank d_in"], Float[Tensor, "choices rank d_out"]]:
    """`build(down, weights, d_in)` and `build(up, weights, d_out)`."""
    if not norm and _fits((*down, *up, weights), down, up):
        native = kernels.kernel()
        if native is not None:
            return _Build.apply(native, (d_in, d_out), weights, *down, *up)  # type: ignore[no-any-return]
    return build(down, weights, d_in, norm), build(up, weights, d_out, norm)


class _Build(torch.autograd.Function):
    """`build` twice, with gradients, in C."""

    @staticmethod
    def forward(
        ctx: Any, native: kernels.Kernels, widths: tuple[int, int], weights: Tensor, *leaves: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.native, ctx.widths = native, widths
        ctx.save_for_backward(weights, *leaves)
        half = len(leaves) // 2
        first, second = (weights.new_empty((len(weights), leaves[0].shape[-2], width)) for width in widths)
        for out, own in ((first, leaves[:half]), (second, leaves[half:])):
            native.build(out.data_ptr(), weights.data_ptr(), *_pointers(own), *_sizes(weights, own, out.shape[2]))
        return first, second

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (nobody passes ctx by name)
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        weights, *leaves = ctx.saved_tensors
        half = len(leaves) // 2
        found = [torch.empty_like(leaf) for leaf in leaves]
        d_weights = weights.new_empty((2, *weights.shape))
        partial = weights.new_empty(leaves[0].shape[-2] * weights.numel())
        for number, gradient in enumerate(gradients):
            part = slice(half * number, half * (number + 1))
            gradient = gradient.contiguous()
            ctx.native.build_backward(
                gradient.data_ptr(),
                d_weights[number].data_ptr(),
                *_pointers(found[part]),
                partial.data_ptr(),
                weights.data_ptr(),
                *_pointers(leaves[part]),
                *_sizes(weights, leaves[part], gradient.shape[2]),
            )
        return None, None, d_weights.sum(0), *found


def _pointers(leaves: Sequence[Tensor]) -> tuple[int, int, int, int]:
    """Of the left half's one or two leaves and the right half's; 0 for one that is not there."""
    places = [leaf.data_ptr() for leaf in leaves]
    if len(places) == 2:
        return places[0], 0, places[1], 0
    return (places[0], 0, places[1], places[2]) if len(places) == 3 else (places[0], places[1], places[2], places[3])


def _sizes(weights: Tensor, leaves: Sequence[Tensor], width: int) -> tuple[int, ...]:
    q = [leaf.shape[-1] for leaf in leaves]
    radices = (q[0], 1, q[1], 1) if len(q) == 2 else (q[0], 1, q[1], q[2]) if len(q) == 3 else q
    choices, terms = weights.shape
    return choices, terms, leaves[0].shape[-2], *radices, width, leaves[0].dim() == 4


def _fits(tensors: Sequence[Tensor], down: Leaves, up: Leaves) -> bool:
    """Whether the twin takes these tensors as they lie."""
    if not 2 <= len(down) == len(up) <= 4 or torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.device.type != "cpu":
            return False
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            return False
    for leaves in (down, up):
        middle = len(leaves) // 2
        rows = columns = 1
        for number, leaf in enumerate(leaves):
            if number < middle:
                rows *= leaf.shape[-1]
            else:
                columns *= leaf.shape[-1]
        if leaves[0].shape[-3] * (rows + columns + 64) > LARGEST:
            return False
    return True
