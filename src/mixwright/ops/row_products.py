"""The two halves of a layer of single neurons, apart: dots of a token with rows, and weighted sums of rows.

They are each other's gradients. `ops.neuron` does both in one pass; a table whose columns lie on several processes
needs the dots of all of them before the nonlinearity, so that it has to stop in between. The arithmetic is that of a
memory of values (one row part), whose sum is one half and whose gradient of the weights is the other.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mixwright.ops.neuron import passes_for
from mixwright.ops.neuron_gradients import Call


def row_dots(
    x: Float[Tensor, "tokens width"], rows: Float[Tensor, "rows width"], indices: Int[Tensor, "tokens k"]
) -> Float[Tensor, "tokens k"]:
    """<x_t, row of indices_tk>, in the type of `x`."""
    return _Dots.apply(x, rows, indices)  # type: ignore[no-any-return]


def row_sums(
    weights: Float[Tensor, "tokens k"], rows: Float[Tensor, "rows width"], indices: Int[Tensor, "tokens k"]
) -> Float[Tensor, "tokens width"]:
    """sum_k weights_tk times the row of indices_tk, in the type of `weights`."""
    return _Sums.apply(weights, rows, indices)  # type: ignore[no-any-return]


def take_rows(
    rows: Float[Tensor, "experts parts width"],
    ids: Int[Tensor, " unique"],
    learning: Bool[Tensor, " unique"],
    *,
    compact: bool,
) -> tuple[Float[Tensor, "unique width"], ...]:
    """The rows `ids` (distinct, ascending), a tensor for each part.

    Those that are `learning` get a gradient: a coalesced sparse tensor of them alone if `compact`, else a dense one.
    """
    return _Take.apply(rows, ids, learning, compact)  # type: ignore[no-any-return]


def _dots(x: Tensor, rows: Tensor, indices: Tensor) -> Tensor:
    if not indices.numel() or not rows.numel():
        return x.new_zeros(indices.shape)
    memory, one = rows[:, None], x.new_ones(indices.shape)
    call = Call(x, memory, one, indices, None, "relu")
    found = passes_for(x, memory, None).backward(call, x, x.new_empty(*indices.shape, 0), of_x=False, of_weights=True)[
        1
    ]
    assert found is not None
    return found


def _sums(weights: Tensor, rows: Tensor, indices: Tensor) -> Tensor:
    x, memory = weights.new_zeros(len(weights), rows.shape[1]), rows[:, None]
    if not indices.numel() or not rows.numel():
        return x
    call = Call(x, memory, weights, indices, None, "relu")
    return passes_for(x, memory, None).forward(call, keep=False)[0]


def _outer(weights: Tensor, x: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """sum of weights_tk x_t over the pairs of each row: what a row learns. Each row adds its pairs in their order."""
    found = rows.new_zeros(len(rows), 1, rows.shape[1])
    if indices.numel() and rows.numel():
        call = Call(x, rows[:, None], weights, indices, None, "relu")
        passes = passes_for(x, call.rows, None)
        passes.reduce(call, x, weights[..., None].contiguous(), passes.group(call), found, None)
    return found[:, 0]


class _Dots(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, indices: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, rows, indices)
        return _dots(x, rows, indices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        x, rows, indices = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        of_x = row_sums(gradient, rows, indices) if ctx.needs_input_grad[0] else None
        of_rows = _outer(gradient, x, indices, rows) if ctx.needs_input_grad[1] else None
        return of_x, of_rows, None


class _Sums(Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, rows: Tensor, indices: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(weights, rows, indices)
        return _sums(weights, rows, indices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        weights, rows, indices = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        of_weights = row_dots(gradient, rows, indices) if ctx.needs_input_grad[0] else None
        of_rows = _outer(weights, gradient, indices, rows) if ctx.needs_input_grad[1] else None
        return of_weights, of_rows, None


class _Take(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ids: Tensor, learning: Tensor, compact: bool) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.save_for_backward(ids, learning)
        ctx.shape, ctx.compact = rows.shape, compact
        return tuple(rows[:, part].index_select(0, ids) for part in range(rows.shape[1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        ids, learning = ctx.saved_tensors
        ids, values = ids[learning], torch.stack(gradients, 1)[learning]
        if ctx.compact:
            made = torch.sparse_coo_tensor(ids[None], values, ctx.shape, check_invariants=False, is_coalesced=True)
            return made, None, None, None
        return values.new_zeros(ctx.shape).index_copy_(0, ids, values), None, None, None
