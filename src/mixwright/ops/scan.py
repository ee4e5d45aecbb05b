"""Recurrences along the sequence without a loop over tokens."""

import torch
from jaxtyping import Float
from torch import Tensor


def decayed_sum_reference(
    values: Float[Tensor, "batch seq width"], keep: Float[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq width"]:
    """y_t = keep_t y_{t-1} + values_t with y_{-1} = 0, token by token."""
    rows: list[Tensor] = []
    for t in range(values.shape[1]):
        rows.append(values[:, t] if t == 0 else keep[:, t, None] * rows[-1] + values[:, t])
    return torch.stack(rows, 1)


def decayed_sum(
    values: Float[Tensor, "batch seq width"], keep: Float[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq width"]:
    """The same as `decayed_sum_reference`, by doubling: after step i each row is the sum over its last 2^i tokens.

    (a, y) o (b, z) = (a b, b y + z) is associative (Hillis and Steele 1986), so log2(seq) whole-sequence steps do.
    """
    total, decay, step = values, keep.unsqueeze(-1), 1
    while step < values.shape[1]:
        total = torch.cat([total[:, :step], total[:, step:] + decay[:, step:] * total[:, :-step]], 1)
        decay = torch.cat([decay[:, :step], decay[:, step:] * decay[:, :-step]], 1)
        step *= 2
    return total
