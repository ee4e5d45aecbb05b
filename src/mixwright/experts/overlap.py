"""Where experts that are masks act together: their union, and pairwise overlap beside what chance would give."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mixwright.experts.base import key_of
from mixwright.experts.dense_deltas import DenseDeltas
from mixwright.experts.sparse_deltas import SparseDeltas
from mixwright.ops.hard_concrete import DEAD, LIMIT

_CHUNK = 1 << 18


class Overlap(NamedTuple):
    """Shares of all weights. `density` (experts,): not masked out. `union`: by all of them at once, none left out.

    `iou` (experts, experts): |i and j| / |i or j|, and `chance`: p q / (p + q - p q), what independent masks of these
    densities would have. `fractional` (experts,): masked in part, neither 0 nor 1.
    """

    density: Float[Tensor, " experts"]
    union: float
    iou: Float[Tensor, "experts experts"]
    chance: Float[Tensor, "experts experts"]
    fractional: Float[Tensor, " experts"]


@torch.no_grad()
def overlap(deltas: SparseDeltas | DenseDeltas, names: tuple[str, ...] | None = None) -> Overlap:
    """Over every weight that may change, or over those of the parameters in `names`.

    A dense change acts wherever it is not 0, and nowhere in part.
    """
    device = deltas.frozen.device
    shared = torch.zeros((deltas.num_experts, deltas.num_experts), dtype=torch.float64, device=device)
    between = torch.zeros(deltas.num_experts, dtype=torch.float64, device=device)
    either, total = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(2))
    for name in deltas.names if names is None else names:
        rows, width = _rows(deltas, name)
        total += rows.shape[1] * width
        for chunk in rows.split(_CHUNK, 1):
            levels = chunk.float() if isinstance(deltas, SparseDeltas) else torch.where(chunk != 0, LIMIT, -LIMIT)
            acting = (levels > DEAD).float()
            shared += width * (acting @ acting.T).double()
            either += width * (acting.amax(0).sum().double() if chunk.shape[1] else 0.0)
            between += width * (levels.abs() < -DEAD).sum(1).double()
    density = shared.diagonal() / total.clamp_min(1)
    p, q = density[:, None], density[None, :]
    least = torch.finfo(torch.float64).tiny
    ones = shared.diagonal()
    return Overlap(
        density=density.float(),
        union=float(either / total.clamp_min(1)),
        iou=(shared / (ones[:, None] + ones[None, :] - shared).clamp_min(least)).float(),
        chance=(p * q / (p + q - p * q).clamp_min(least)).float(),
        fractional=(between / total.clamp_min(1)).float(),
    )


def _rows(deltas: SparseDeltas | DenseDeltas, name: str) -> tuple[Float[Tensor, "experts units"], float]:
    """Mask logits, or dense changes, of a parameter; and how many weights each of them is about."""
    if isinstance(deltas, DenseDeltas):
        return deltas.delta[key_of(name)].flatten(1), 1.0
    rows = deltas.logits_of(name).reshape(deltas.num_experts, -1)
    return rows, deltas.change_of(name).numel() / max(rows.shape[1], 1)
