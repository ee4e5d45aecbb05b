"""Scores that are running means over the tokens around: a token's own score is a noisy vote."""

import torch
from jaxtyping import Float
from torch import Tensor

from mixwright.ops.scan import decayed_sum
from mixwright.routing import RoutingMemory


def pool_causal(
    memory: RoutingMemory,
    name: str,
    scores: Float[Tensor, "batch seq experts"],
    real: Float[Tensor, "batch seq"],
    decay: float,
) -> Float[Tensor, "batch seq experts"]:
    """s_t = sum_{u <= t} d^(t-u) score_u / sum_{u <= t} d^(t-u), over real tokens, counted in real tokens.

    The running mean s_t = d s_{t-1} + (1 - d) score_t without its bias towards zero at the beginning. What earlier
    passes saw is in `memory` under `name`, which is brought up to date. A padding token before all others keeps its
    own score.
    """
    counted, keep = _counted(scores, real, decay)
    earlier = memory.latest(name)
    if earlier is not None:
        counted = torch.cat([counted[:, :1] + (keep[:, :1, None] * earlier.unsqueeze(1)), counted[:, 1:]], 1)
    sums = decayed_sum(counted, keep)
    memory.keep(name, sums)
    return _mean(sums, scores)


def pool_both_ways(
    scores: Float[Tensor, "batch seq experts"], real: Float[Tensor, "batch seq"], decay: float
) -> Float[Tensor, "batch seq experts"]:
    """s_t = sum_u d^|t-u| score_u / sum_u d^|t-u| over all real tokens u, for streams that see the whole sequence."""
    counted, keep = _counted(scores, real, decay)
    before = decayed_sum(counted, keep)
    after = decayed_sum(counted.flip(1), keep.flip(1)).flip(1)
    return _mean(before + after - counted, scores)


def _counted(scores: Tensor, real: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    weights = real.unsqueeze(-1)
    return torch.cat([scores * weights, weights], -1), torch.where(real > 0.5, decay, 1.0)


def _mean(sums: Tensor, scores: Tensor) -> Tensor:
    weight = sums[..., -1:]
    return torch.where(weight > 0.0, sums[..., :-1] / weight.clamp_min(torch.finfo(sums.dtype).tiny), scores)
