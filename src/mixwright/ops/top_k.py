"""The k largest scores, with ties broken alike on every device."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def top_k(scores: Float[Tensor, "*batch experts"], k: int) -> tuple[Float[Tensor, "*batch k"], Int[Tensor, "*batch k"]]:
    """The `k` largest scores and their indices, best first; among equals the lowest index comes first.

    `torch.topk` promises no order among equals; a stable sort does, and for small k repeated maxima are cheaper. No
    index comes twice; where fewer than `k` scores are above -inf, the values that are left are -inf.
    """
    if k > scores.shape[-1]:
        raise ValueError(f"top_k={k} is larger than the pool of {scores.shape[-1]} experts; choose a smaller top_k.")
    if k > 4:
        values, indices = torch.sort(scores, dim=-1, descending=True, stable=True)
        return values[..., :k], indices[..., :k]
    chosen: list[Tensor] = []
    # What was taken falls to -inf, below what came in as -inf, so that no index is taken twice.
    rest = scores.detach().clamp_min(torch.finfo(scores.dtype).min)
    for _ in range(k):
        best = rest.argmax(-1, keepdim=True)
        chosen.append(best)
        if len(chosen) < k:
            rest = rest.scatter(-1, best, -torch.inf)
    indices = torch.cat(chosen, -1)
    return scores.gather(-1, indices), indices
