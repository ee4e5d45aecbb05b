"""Scores of retrieved experts as a function of queries and sub-keys, looking at the retrieved sub-keys only."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def selected_scores(
    queries: Float[Tensor, "tokens heads 2 half"],
    first: Float[Tensor, "key_heads n1 half"],
    second: Float[Tensor, "key_heads n2 half"],
    indices: Int[Tensor, "tokens heads k"],
) -> Float[Tensor, "tokens heads k"]:
    """<q, c_i> + <q', c'_j> of each id i * n2 + j. `key_heads` is 1 where heads share their sub-keys."""
    n2 = second.shape[1]
    rows, columns = indices // n2, indices % n2
    head = torch.arange(queries.shape[1], device=queries.device)[None, :, None] if first.shape[0] > 1 else 0
    return torch.einsum("thd,thkd->thk", queries[:, :, 0], first[head, rows]) + torch.einsum(
        "thd,thkd->thk", queries[:, :, 1], second[head, columns]
    )
