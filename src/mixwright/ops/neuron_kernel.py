"""Sums over single-neuron experts by the compiled functions of `native/neuron*.c`: float32 and bfloat16 on a CPU.

Rows are read once in the forward pass and once in the backward pass, straight from the table; what is made besides the
results is a few numbers for each (token, expert).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixwright.ops.kernels import Kernels
from mixwright.ops.neuron_gradients import AbstractPasses, Call, Grouped, outside
from mixwright.ops.neuron_reference import ACTIVATIONS, Activation

WIDEST = 1 << 15
"""Numbers in a row that the functions hold a few of on their stack."""

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


def fits(x: Tensor, rows: Tensor, bias: Tensor | None) -> bool:
    """Whether the functions take these tensors."""
    return (
        x.is_cpu
        and rows.is_cpu
        and x.dtype in (torch.float32, torch.bfloat16)
        and rows.dtype in _TYPES
        and rows.is_contiguous()
        and 1 <= rows.shape[1] <= 3
        and rows.shape[2] <= WIDEST
        and len(rows) < 1 << 32
        and (bias is None or bias.dtype in (torch.float32, torch.bfloat16))
    )


class CompiledPasses(AbstractPasses):
    """The arithmetic of `ops/neuron_gradients.py` in C."""

    def __init__(self, native: Kernels) -> None:
        self.native = native

    def forward(self, call: Call, keep: bool) -> tuple[Tensor, Tensor | None]:
        """One call for all tokens."""
        before = call.x.new_empty((*call.indices.shape, call.rows.shape[1] - 1), dtype=torch.float32) if keep else None
        return self._forward(call, None, before), before

    def quantised(self, call: Call, scales: Float[Tensor, "experts parts"]) -> Tensor:
        """The sum with rows of int8 and float32 `scales` of each row part; no gradients."""
        return self._forward(call, scales.float().contiguous(), None)

    def _forward(self, call: Call, scales: Tensor | None, before: Tensor | None) -> Tensor:
        x, (experts, parts, width) = call.x.contiguous(), call.rows.shape
        weights, indices, bias = _given(call)
        out = torch.empty_like(x)
        if self.native.neurons(
            *_pointers(out, x, call.rows, scales, bias, weights, indices, before),
            *indices.shape, experts, parts, width, _TYPES[call.rows.dtype], _TYPES[x.dtype], _number(call.activation),
        ):  # fmt: skip
            raise outside(call)
        return out

    def backward(
        self, call: Call, dy: Tensor, before: Tensor, of_x: bool, of_weights: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """One call for all tokens."""
        x, (experts, parts, width) = call.x.contiguous(), call.rows.shape
        weights, indices, bias = _given(call)
        dx = (torch.empty_like(x) if parts > 1 else torch.zeros_like(x)) if of_x else None
        d_weights = torch.empty_like(weights) if of_weights else None
        factors = before.new_empty((*indices.shape, parts))
        dy = dy.to(x.dtype).contiguous()
        self.native.neurons_backward(
            *_pointers(dx, d_weights, factors, x, dy, call.rows, bias, weights, indices, before),
            *indices.shape, experts, parts, width, _TYPES[call.rows.dtype], _TYPES[x.dtype], _number(call.activation),
        )  # fmt: skip
        return dx, None if d_weights is None else d_weights.to(call.weights.dtype), factors

    def group(self, call: Call) -> Grouped:
        """A radix sort of the pairs that act."""
        weights, indices, _ = _given(call)
        pairs = indices.numel()
        found, ids, starts = (indices.new_empty(size) for size in (2 * pairs, pairs, pairs + 1))
        count = self.native.sort_pairs(*_pointers(found, ids, starts, indices, weights), pairs, len(call.rows))
        return Grouped(found, ids[:count], starts)

    def reduce(
        self, call: Call, dy: Tensor, factors: Tensor, grouped: Grouped, d_rows: Tensor | None, d_bias: Tensor | None
    ) -> None:
        """Every row that acts is written once."""
        _, parts, width = call.rows.shape
        x, dy = call.x.float().contiguous(), dy.float().contiguous()
        dense = d_rows is not None and len(d_rows) != len(grouped.ids)
        self.native.neurons_rows(
            *_pointers(d_rows, d_bias, grouped.pairs, grouped.ids, grouped.starts, x, dy, factors),
            len(grouped.ids), call.indices.shape[1], parts, width, _TYPES[call.rows.dtype], dense,
        )  # fmt: skip


def _given(call: Call) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"], Tensor | None]:
    """Weights, indices and biases as C takes them."""
    bias = None if call.bias is None else call.bias.float().contiguous()
    return call.weights.float().contiguous(), call.indices.long().contiguous(), bias


def _pointers(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _number(activation: Activation) -> int:
    return ACTIVATIONS.index(activation)
