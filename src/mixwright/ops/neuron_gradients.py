"""Gradients of sums over single-neuron experts, whoever does the arithmetic.

Only the values before the nonlinearity are kept, `parts - 1` numbers for each (token, expert), and no `(tokens, k,
width)` is ever made. Gradients of the rows are sums over the pairs that name a row, sorted by row: compact, or put into
a dense tensor.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mixwright.ops.huge_pages import SpareMemory, zeros
from mixwright.ops.neuron_reference import Activation, Gradient, neurons_reference


class Call(NamedTuple):
    """What is summed; `bias` may be missing."""

    x: Tensor
    rows: Tensor
    weights: Tensor
    indices: Tensor
    bias: Tensor | None
    activation: Activation


class Grouped(NamedTuple):
    """Pairs that act in the order of their experts: `ids` the experts, `starts` where each one's pairs begin."""

    pairs: Tensor
    ids: Tensor
    starts: Tensor


class AbstractPasses(ABC):
    """The arithmetic."""

    @abstractmethod
    def forward(self, call: Call, keep: bool) -> tuple[Tensor, Tensor | None]:
        """The sum and, to `keep`, the values before the nonlinearity."""

    @abstractmethod
    def backward(
        self, call: Call, dy: Tensor, before: Tensor, of_x: bool, of_weights: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Gradients of x and of the weights, and each pair's factors `(tokens, k, parts)` for its rows' gradients."""

    @abstractmethod
    def group(self, call: Call) -> Grouped:
        """The pairs of weight other than 0 by expert."""

    @abstractmethod
    def reduce(
        self, call: Call, dy: Tensor, factors: Tensor, grouped: Grouped, d_rows: Tensor | None, d_bias: Tensor | None
    ) -> None:
        """Fill `d_rows`, compact as `ids` or dense as the table, and the dense `d_bias`."""


def combine(
    passes: AbstractPasses,
    x: Float[Tensor, "tokens width"],
    rows: Tensor,
    weights: Tensor,
    indices: Tensor,
    activation: Activation,
    bias: Tensor | None,
    gradient: Gradient,
    spare: SpareMemory | None = None,
) -> Float[Tensor, "tokens width"]:
    """The sum, with gradients where any is asked for; those of the rows in `spare` memory."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, rows, weights, bias)):
        return _Combine.apply(passes, activation, gradient, spare, x, rows, weights, indices, bias)  # type: ignore[no-any-return]
    return passes.forward(Call(x, rows, weights, indices, bias, activation), keep=False)[0]


class _Combine(torch.autograd.Function):
    """A gradient of the gradient goes by the reference."""

    @staticmethod
    def forward(
        ctx: Any,
        passes: AbstractPasses,
        activation: Activation,
        gradient: Gradient,
        spare: SpareMemory | None,
        x: Tensor,
        rows: Tensor,
        weights: Tensor,
        indices: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        out, before = passes.forward(Call(x, rows, weights, indices, bias, activation), keep=True)
        ctx.passes, ctx.activation, ctx.gradient, ctx.spare = passes, activation, gradient, spare
        ctx.save_for_backward(x, rows, weights, indices, bias, before)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  (nobody passes ctx by name)
        x, rows, weights, indices, bias, before = ctx.saved_tensors
        call = Call(x, rows, weights, indices, bias, ctx.activation)
        if torch.is_grad_enabled():
            return None, None, None, None, *_by_reference(call, dy)
        of_x, of_rows, of_weights, _, of_bias = ctx.needs_input_grad[4:]
        with torch.autocast(x.device.type, enabled=False):
            dx, d_weights, factors = ctx.passes.backward(call, dy, before, of_x, of_weights)
            d_rows, d_bias = None, None
            if of_rows or of_bias:
                gradient = ctx.gradient if of_rows else None
                d_rows, d_bias = _of_table(ctx.passes, call, dy, factors, gradient, of_bias, ctx.spare or SpareMemory())
        return None, None, None, None, dx, d_rows, d_weights, None, d_bias


def _of_table(
    passes: AbstractPasses,
    call: Call,
    dy: Tensor,
    factors: Tensor,
    gradient: Gradient | None,
    of_bias: bool,
    spare: SpareMemory,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the rows and of the biases."""
    grouped, rows, d_rows, sparse = passes.group(call), call.rows, None, False
    if gradient is not None:
        many = 2 * len(grouped.ids) >= len(rows)
        sparse = gradient == "compact" or (gradient == "auto" and not many)
        if sparse:
            d_rows = spare.empty((len(grouped.ids), *rows.shape[1:]), rows.dtype, rows.device)
        elif many:  # most of it is written anyhow
            d_rows = _clear_others(spare.empty(rows.shape, rows.dtype, rows.device), grouped.ids)
        else:
            d_rows = zeros(rows.shape, rows.dtype, rows.device)
    d_bias = torch.zeros_like(call.bias, dtype=factors.dtype) if of_bias and call.bias is not None else None
    passes.reduce(call, dy, factors, grouped, d_rows, d_bias)
    if sparse:
        assert d_rows is not None
        d_rows = torch.sparse_coo_tensor(
            grouped.ids[None], d_rows, rows.shape, is_coalesced=True, check_invariants=False
        )
    return d_rows, None if d_bias is None or call.bias is None else d_bias.to(call.bias.dtype)


def _clear_others(d_rows: Tensor, ids: Tensor) -> Tensor:
    """Zeros in the rows that no id names."""
    others = torch.ones(len(d_rows), dtype=torch.bool, device=d_rows.device)
    others[ids] = False
    return d_rows.index_fill_(0, others.nonzero().squeeze(-1), 0)


def outside(call: Call) -> IndexError:
    """What is wrong with the indices."""
    low, high = call.indices.aminmax()
    return IndexError(f"indices from {low} to {high}: expected ids of the table's {len(call.rows)} experts, from 0.")


def _by_reference(call: Call, dy: Tensor) -> list[Tensor | None]:
    """Gradients that have gradients themselves."""
    given = (call.x, call.rows, call.weights, None, call.bias)
    out = neurons_reference(call.x, call.rows, call.weights, call.indices, call.activation, call.bias)
    wanted = [t for t in given if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, dy, create_graph=True))
    return [next(found) if t is not None and t.requires_grad else None for t in given]
