"""Product-key retrieval by Triton's kernels: `route` of `ops/route.py` on a GPU, without asking the device anything.

As everywhere ties go to the lowest id; only where rounding alone makes sums equal may a pair beyond the staircase
with a lower id be passed over.
"""

from typing import Any

import torch
from torch import Tensor

from mixwright.ops.best_sums import staircase
from mixwright.ops.triton import route_kernels

kernels: Any = route_kernels  # launched by rules of Triton's own

MOST = 128
"""Retrieved experts of a head up to which lists fit into registers."""


def fits(queries: Tensor, first: Tensor, second: Tensor, k: int) -> bool:
    """Whether the kernels take this."""
    narrow = all(t.dtype != torch.float64 for t in (queries, first, second))
    return narrow and k <= MOST and first.shape[1] * second.shape[1] < 1 << 32


def best_keys(
    queries: Tensor,
    first: Tensor,
    second: Tensor,
    k: int,
    first_bias: Tensor | None,
    second_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores and ids `(tokens, heads, k)`, log-partition and entropy `(tokens, heads)`.

    Two launches for the halves, one that combines them.
    """
    (tokens, heads, _, half), axes = queries.shape, (first.contiguous(), second.contiguous())
    queries, rows = queries.contiguous(), tokens * heads
    biases = [None if bias is None else bias.contiguous() for bias in (first_bias, second_bias)]
    wanted, shared = _power(k), len(first) == 1
    kept = max(2, wanted)
    best = queries.new_empty((tokens, heads, 2, kept), dtype=torch.int64)
    sums = queries.new_empty((tokens, heads, 2, 2), dtype=torch.float32)
    chunk = min(64, max(16, _power(half)))
    for side, (axis, bias) in enumerate(zip(axes, biases, strict=True)):
        grid = (-(-tokens // 16), heads)
        kernels.best_half[grid](
            best, sums, queries, axis, bias, tokens, heads, shared, axis.shape[1], half, side,
            BIASED=bias is not None, KEPT=kept, TOKENS=16, KEYS=max(64, kept),
            HALF=-(-half // chunk) * chunk, CHUNK=chunk,
        )  # fmt: skip
    n1, n2 = first.shape[1], second.shape[1]
    ranks = [rank.to(torch.int32).to(queries.device) for rank in staircase(k, n1, n2)]
    scores = queries.new_empty((tokens, heads, k), dtype=torch.float32)
    ids = best.new_empty((tokens, heads, k))
    kernels.combine[(-(-rows // 4),)](
        scores, ids, best, *ranks, queries, *axes, rows, heads, shared, n1, n2, half, k, len(ranks[0]),
        BIASED=any(bias is not None for bias in biases), KEPT=kept, WANTED=kept,
        PAIRS=max(kept, _power(len(ranks[0]))), ROWS=4, CHUNK=16,
    )  # fmt: skip
    return scores, ids, sums[..., 0].sum(-1), sums[..., 1].sum(-1)


def _power(count: int) -> int:
    """The least power of two that is no smaller."""
    return 1 << max(0, count - 1).bit_length()
