"""Both factors of an adapted layer from their leaves, by the compiled twin of `build` where it fits.

At a few tokens most of a training step is the bookkeeping of many small operations: here both factors are one node of
autograd's graph, whose forward and backward are one call for each factor. What the twin doesn't take (another type or
device, a norm, a gradient of the gradient, no compiler at hand) goes the plain way of `ops/tensor_product.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mixwright.ops import kernels
from mixwright.ops.tensor_product import Leaves, build

LARGEST = 3 << 17
"""Numbers that the twin may hold on its stack."""

_GROUP = 16
_PLACES = {2: (0, None, 1, None), 3: (0, None, 1, 2), 4: (0, 1, 2, 3)}
"""For each order, the leaves of the left half's two places and of the right half's."""


def build_factors(
    down: Leaves, up: Leaves, weights: Float[Tensor, "choices terms"], d_in: int, d_out: int, norm: bool = False
) -> tuple[Float[Tensor, "choices rank d_in"], Float[Tensor, "choices rank d_out"]]:
    """`build(down, weights, d_in)` and `build(up, weights, d_out)`."""
    if not norm and 2 <= len(down) == len(up) <= 4 and _plain(weights, *down, *up):
        native, sizes = kernels.kernel(), [_sizes(weights, *side) for side in ((down, d_in), (up, d_out))]
        if native is not None and max(map(_held, sizes)) <= LARGEST:
            tensors = (weights, *down, *up)
            if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
                return _Build.apply(native, sizes, *tensors)  # type: ignore[no-any-return]
            return _forward(native, sizes, *tensors)
    return build(down, weights, d_in, norm), build(up, weights, d_out, norm)


def _forward(native: kernels.Kernels, sizes: Sequence[tuple[int, ...]], *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors."""
    down, up = (tensors[0].new_empty((size[0], size[2], size[7])) for size in sizes)
    for made, given in zip((down, up), _given(sizes, *tensors), strict=True):
        native.build(made.data_ptr(), *given)
    return down, up


def _given(sizes: Sequence[tuple[int, ...]], weights: Tensor, *leaves: Tensor) -> list[tuple[int, ...]]:
    """What is handed to C for each factor."""
    half, place = len(leaves) // 2, weights.data_ptr()
    return [(place, *_pointers(own), *size) for own, size in zip((leaves[:half], leaves[half:]), sizes, strict=True)]


class _Build(torch.autograd.Function):
    """`build` twice, with gradients, in C; a gradient of the gradient goes torch's own way."""

    @staticmethod
    def forward(
        ctx: Any, native: kernels.Kernels, sizes: Sequence[tuple[int, ...]], *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.native, ctx.sizes = native, sizes
        ctx.save_for_backward(*tensors)
        return _forward(native, sizes, *tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  (nobody passes ctx by name)
        weights, *leaves = tensors = ctx.saved_tensors
        if torch.is_grad_enabled() or not _plain(*tensors):
            return None, None, *_by_torch(ctx.sizes, tensors, gradients)
        half = len(leaves) // 2
        d_weights, found = torch.zeros_like(weights), [torch.empty_like(leaf) for leaf in leaves]
        place = d_weights.data_ptr()
        for gradient, own, given in zip(gradients, (found[:half], found[half:]), _given(ctx.sizes, *tensors)):
            gradient = gradient.contiguous()
            ctx.native.build_backward(gradient.data_ptr(), place, *_pointers(own), *given)
        return None, None, d_weights, *found


def _by_torch(
    sizes: Sequence[tuple[int, ...]], tensors: Sequence[Tensor], gradients: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients of `tensors`, themselves with a gradient where one is recorded."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        weights, *leaves = (t if again else t.detach().requires_grad_(t.requires_grad) for t in tensors)
        half, wanted = len(leaves) // 2, [t for t in (weights, *leaves) if t.requires_grad]
        made = [build(own, weights, size[7]) for own, size in zip((leaves[:half], leaves[half:]), sizes, strict=True)]
        found = iter(torch.autograd.grad(made, wanted, list(gradients), create_graph=again))
    return [next(found) if tensor.requires_grad else None for tensor in tensors]


def _pointers(leaves: Sequence[Tensor]) -> list[int]:
    """Of the leaves in their places; 0 for one that is not there."""
    return [0 if place is None else leaves[place].data_ptr() for place in _PLACES[len(leaves)]]


def _sizes(weights: Tensor, leaves: Leaves, width: int) -> tuple[int, ...]:
    """Choices, terms, rank, four radices, the width, and whether every choice has leaves of its own."""
    radices = [1 if place is None else leaves[place].shape[-1] for place in _PLACES[len(leaves)]]
    return (*weights.shape, leaves[0].shape[-2], *radices, width, leaves[0].dim() == 4)


def _held(sizes: tuple[int, ...]) -> int:
    """Numbers that the twin has on its stack, about."""
    choices, terms, rank, n1, n2, m1, m2, _, _ = sizes
    rows, columns = n1 * n2, m1 * m2
    return _GROUP * (2 * (terms + 3) * (2 * rows + 2 * columns + _GROUP) + _GROUP * columns) + choices * terms * rank


def _plain(*tensors: Tensor) -> bool:
    """Whether the twin takes these tensors as they lie."""
    if torch.compiler.is_compiling() or not tensors[0].numel():
        return False
    for tensor in tensors:
        if tensor.dtype != torch.float32 or not tensor.is_cpu or not tensor.is_contiguous():
            return False
        if type(tensor) is not torch.nn.Parameter and type(tensor) is not Tensor:
            return False
    return True
