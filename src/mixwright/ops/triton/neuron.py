"""Sums over single-neuron experts by Triton's kernels: the passes of `ops/neuron_gradients.py` on a GPU.

Any width is taken; float32 inside, float32, bfloat16 or float16 outside. Which rows act is asked of the device once in
a backward pass that wants gradients of them: a compact gradient has a size.
"""

from typing import Any

import torch
from torch import Tensor

from mixwright.ops.neuron_gradients import AbstractPasses, Call, Grouped
from mixwright.ops.neuron_reference import ACTIVATIONS
from mixwright.ops.triton import neuron_kernels

kernels: Any = neuron_kernels  # launched by rules of Triton's own

HELD = 8192
"""Numbers of rows that a program holds at once for each part."""

HEAVY = 64
"""Pairs of a row that one program sums."""


def fits(x: Tensor, rows: Tensor) -> bool:
    """Whether the kernels take these tensors."""
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return x.dtype in narrow and rows.dtype in narrow and rows.is_contiguous() and 1 <= rows.shape[1] <= 3


class TritonPasses(AbstractPasses):
    """The arithmetic in Triton. `programs`: how many the device wants, where tokens are fewer than that."""

    def __init__(self, programs: int) -> None:
        self.programs = programs

    def forward(self, call: Call, keep: bool) -> tuple[Tensor, Tensor | None]:
        """One launch. Nothing is kept: backward reads the rows again anyway."""
        del keep
        splits, each, sizes = self._sizes(call)
        out = call.x.new_empty((splits, *call.x.shape), dtype=torch.float32 if splits > 1 else call.x.dtype)
        x, weights, indices, bias = _given(call)
        kernels.forward[(len(x), splits)](
            out, x, call.rows, bias, weights, indices, len(x), indices.shape[1], x.shape[1], each, **sizes
        )
        return _summed(out, call.x.dtype), None

    def backward(
        self, call: Call, dy: Tensor, before: Tensor | None, of_x: bool, of_weights: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """One launch by tokens."""
        del before
        splits, each, sizes = self._sizes(call)
        x, weights, indices, bias = _given(call)
        dx = x.new_empty((splits, *x.shape), dtype=torch.float32)
        d_weights = torch.empty_like(weights, dtype=torch.float32)
        factors = d_weights.new_empty((*indices.shape, call.rows.shape[1]))
        kernels.backward[(len(x), splits)](
            dx, d_weights, factors, x, dy.contiguous(), call.rows, bias, weights, indices,
            len(x), indices.shape[1], x.shape[1], each, ALL=of_weights, **sizes,
        )  # fmt: skip
        gradient = d_weights.to(call.weights.dtype) if of_weights else None
        return _summed(dx, x.dtype) if of_x else None, gradient, factors

    def group(self, call: Call) -> Grouped:
        """A stable sort of the pairs that act."""
        experts = torch.where(call.weights != 0, call.indices, len(call.rows)).flatten()
        ordered, pairs = experts.sort(stable=True)
        ids, counts = ordered.unique_consecutive(return_counts=True)
        counts, ids = counts[ids < len(call.rows)], ids[ids < len(call.rows)]
        return Grouped(pairs, ids, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))

    def reduce(
        self, call: Call, dy: Tensor, factors: Tensor, grouped: Grouped, d_rows: Tensor | None, d_bias: Tensor | None
    ) -> None:
        """One program for each row, and for a row of many pairs one for each 64, summed in a second launch."""
        if not len(grouped.ids):
            return
        size = call.rows.shape[1] * call.rows.shape[2]
        counts = grouped.starts.diff()
        dense = d_rows is None or len(d_rows) != len(grouped.ids)
        places = grouped.ids if dense else torch.arange(len(grouped.ids), device=counts.device)
        heavy = counts > HEAVY
        light = ~heavy
        starts = grouped.starts[:-1]
        self._reduce(call, dy, factors, grouped.pairs, starts[light], counts[light], places[light], d_rows, d_bias)
        if not bool(heavy.any()):
            return
        pieces = -(-counts[heavy] // HEAVY)
        ends = pieces.cumsum(0)
        owner = torch.repeat_interleave(torch.arange(len(pieces), device=ends.device), pieces)
        order = torch.arange(len(owner), device=ends.device)
        offset = (order - (ends - pieces)[owner]) * HEAVY
        first = starts[heavy][owner] + offset
        count = (counts[heavy][owner] - offset).clamp_max(HEAVY)
        held = factors.new_empty((len(owner), size)) if d_rows is not None else None
        wide = factors.new_empty((len(owner), call.rows.shape[1] - 1)) if d_bias is not None else None
        self._reduce(call, dy, factors, grouped.pairs, first, count, order, held, wide)
        for whole, parts, where in ((d_rows, held, places[heavy]), (d_bias, wide, grouped.ids[heavy])):
            if whole is not None and parts is not None:
                block = min(1024, _power(parts.shape[1]))
                grid = (len(pieces), -(-parts.shape[1] // block))
                kernels.gather[grid](whole, parts, ends - pieces, ends, where, parts.shape[1], BLOCK=block)

    def _reduce(
        self,
        call: Call,
        dy: Tensor,
        factors: Tensor,
        pairs: Tensor,
        begins: Tensor,
        counts: Tensor,
        places: Tensor,
        to: Tensor | None,
        d_bias: Tensor | None,
    ) -> None:
        if not len(begins):
            return
        (_, parts, width), padded = call.rows.shape, _power(call.rows.shape[2])
        experts = places
        if d_bias is not None and len(d_bias) == len(call.rows):
            experts = call.indices.flatten()[pairs[begins]]
        kernels.reduce[(len(begins),)](
            to, d_bias, call.x.contiguous(), dy.contiguous(), factors, pairs, begins, begins + counts, places, experts,
            call.indices.shape[1], width, PARTS=parts, ROWS=to is not None, BIASED=d_bias is not None,
            BLOCK=max(1, min(8, HELD // padded)), WIDTH=padded,
        )  # fmt: skip

    def _sizes(self, call: Call) -> tuple[int, int, dict[str, Any]]:
        """Parts that a token's pairs are split into, the pairs of each, and what is known when a kernel is compiled."""
        pairs, padded = call.indices.shape[1], _power(call.rows.shape[2])
        block = max(1, min(8, HELD // padded))
        splits = max(1, min(self.programs // max(1, len(call.x)), -(-pairs // block)))
        each = -(-pairs // splits)
        sizes = {
            "PARTS": call.rows.shape[1],
            "BIASED": call.bias is not None,
            "KIND": ACTIVATIONS.index(call.activation),
            "BLOCK": block,
            "WIDTH": padded,
        }
        return -(-pairs // each), each, sizes


def _given(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    return call.x.contiguous(), call.weights.contiguous(), call.indices.contiguous(), call.bias


def _summed(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The parts in their order."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total.to(dtype)


def _power(count: int) -> int:
    """The least power of two that is no smaller."""
    return 1 << max(0, count - 1).bit_length()
