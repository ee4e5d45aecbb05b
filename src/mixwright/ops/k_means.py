"""Lloyd's k-means, from a seed, with no cluster left empty while there are points enough."""

import torch
from jaxtyping import Float
from torch import Tensor


def k_means(points: Float[Tensor, "points width"], k: int, seed: int, rounds: int = 10) -> Float[Tensor, "k width"]:
    """`k` centres of `points`, drawn far apart to begin with (k-means++); empty ones go where the fit is worst.

    Raises ValueError for fewer points than centres.
    """
    if not 1 <= k <= len(points):
        raise ValueError(f"k_means: {k} centres of {len(points)} points; give 1 to {len(points)} centres.")
    generator = torch.Generator().manual_seed(seed)
    centres = _spread(points, k, generator)
    for _ in range(rounds):
        distances = torch.cdist(points, centres)
        nearest = distances.min(-1)
        counts = nearest.indices.bincount(minlength=k)
        sums = torch.zeros_like(centres).index_add_(0, nearest.indices, points)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centres)
        empty = (counts == 0).nonzero().flatten()
        if len(empty):
            centres[empty] = points[nearest.values.topk(len(empty)).indices]
    return centres


def _spread(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Each next point with a probability proportional to its squared distance from those before it."""
    chosen = [int(torch.randint(len(points), (), generator=generator))]
    distance = (points - points[chosen[0]]).square().sum(-1)
    while len(chosen) < k:
        chances = (distance if float(distance.sum()) > 0 else torch.ones_like(distance)).double().cpu()
        chosen.append(int(torch.multinomial(chances, 1, generator=generator)))
        distance = distance.minimum((points - points[chosen[-1]]).square().sum(-1))
    return points[chosen].clone()
