"""The two halves of a layer of single neurons, apart: dots of a token with rows, and weighted sums of rows.

They are each other's gradients. `ops.neuron` does both in one pass; a table whose columns lie on several processes
needs the dots of all of them before the nonlinearity, so that it has to stop in between.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

_CHUNK = 1 << 22  # gathered values at a time: 16 MiB in float32


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


def _gathered(rows: Tensor, indices: Tensor, dtype: torch.dtype):
    """Rows of some tokens at a time: (tokens, their rows)."""
    step = max(1, _CHUNK // max(1, indices.shape[1] * rows.shape[1]))
    for start in range(0, len(indices), step):
        some = indices[start : start + step]
        yield slice(start, start + step), rows.index_select(0, some.reshape(-1)).to(dtype).view(*some.shape, -1)


def _dots(x: Tensor, rows: Tensor, indices: Tensor) -> Tensor:
    dots = x.new_empty(indices.shape)
    for tokens, taken in _gathered(rows, indices, x.dtype):
        torch.bmm(taken, x[tokens, :, None], out=dots[tokens, :, None])
    return dots


def _sums(weights: Tensor, rows: Tensor, indices: Tensor) -> Tensor:
    if rows.dtype == weights.dtype and rows.is_contiguous() and len(rows) and indices.numel():
        return embedding_bag(indices, rows, per_sample_weights=weights, mode="sum")
    sums = weights.new_empty((len(weights), rows.shape[1]))
    for tokens, taken in _gathered(rows, indices, weights.dtype):
        torch.bmm(weights[tokens, None], taken, out=sums[tokens, None])
    return sums


def _outer(weights: Tensor, x: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """sum of weights_tk x_t over the pairs of each row: what a row learns. Each row adds its pairs in their order."""
    order = indices.reshape(-1).argsort(stable=True)
    counts = torch.bincount(indices.reshape(-1), minlength=len(rows))
    if not len(order):
        return x.new_zeros(rows.shape, dtype=rows.dtype)
    offsets = counts.cumsum(0) - counts
    tokens = order // indices.shape[1]
    values = weights.reshape(-1)[order]
    return embedding_bag(tokens, x.contiguous(), offsets, per_sample_weights=values, mode="sum").to(rows.dtype)


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
