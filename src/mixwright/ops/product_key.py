"""The top k of n1 * n2 sums without looking at all of them, and exact sums over all of them at the cost of n1 + n2.

The key of expert (i, j) is two sub-keys side by side, so its score is a sum s_i + s'_j (Lample et al. 2019, section
3.2; He 2024, section 2.2). Experts go by id = i * n2 + j.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class ProductKeys(NamedTuple):
    """The retrieved experts: `scores` `(*batch, k)` without selection bias, and their ids, the best first."""

    scores: Tensor
    indices: Tensor


def staircase(k: int, n1: int, n2: int) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """Ranks (i, j), counted from 0, of the pairs that can be among the k best: (i + 1) (j + 1) <= k.

    A pair is beaten by all (i + 1) (j + 1) - 1 pairs of no lower ranks. Each of these can win: there are 50 at k = 16.
    """
    pairs = [(i, j) for i in range(min(k, n1)) for j in range(min(k // (i + 1), n2))]
    first, second = zip(*pairs)
    return torch.tensor(first), torch.tensor(second)


def product_key_top_k(
    first: Float[Tensor, "*batch n1"],
    second: Float[Tensor, "*batch n2"],
    k: int,
    first_bias: Float[Tensor, "*#batch n1"] | None = None,
    second_bias: Float[Tensor, "*#batch n2"] | None = None,
) -> ProductKeys:
    """The k experts with the largest sums, ties to the lowest id; biases count for the choice and not in the scores.

    A bias of -inf keeps a sub-key out; where fewer than k experts remain, the rest has the score -inf. Raises
    ValueError unless 1 <= k <= n1 * n2.
    """
    n1, n2 = first.shape[-1], second.shape[-1]
    _check(k, n1, n2)
    chosen_first = first if first_bias is None else first + first_bias
    chosen_second = second if second_bias is None else second + second_bias
    best_first, rows = _best(chosen_first, min(k, n1))
    best_second, columns = _best(chosen_second, min(k, n2))
    i, j = (ranks.to(first.device) for ranks in staircase(k, n1, n2))
    sums = best_first[..., i] + best_second[..., j]
    rows, columns = rows[..., i], columns[..., j]
    by_id = (rows * n2 + columns).argsort(-1)
    sums, rows, columns = (t.gather(-1, by_id) for t in (sums, rows, columns))
    sums, order = sums.sort(dim=-1, descending=True, stable=True)
    rows, columns = (t.gather(-1, order[..., :k]) for t in (rows, columns))
    scores = first.gather(-1, rows) + second.gather(-1, columns)
    return ProductKeys(scores.masked_fill(sums[..., :k] == -torch.inf, -torch.inf), rows * n2 + columns)


def product_key_top_k_reference(
    first: Float[Tensor, "*batch n1"],
    second: Float[Tensor, "*batch n2"],
    k: int,
    first_bias: Float[Tensor, "*#batch n1"] | None = None,
    second_bias: Float[Tensor, "*#batch n2"] | None = None,
) -> ProductKeys:
    """The same by looking at all n1 * n2 sums."""
    _check(k, first.shape[-1], second.shape[-1])
    chosen_first = first if first_bias is None else first + first_bias
    chosen_second = second if second_bias is None else second + second_bias
    sums = (chosen_first[..., :, None] + chosen_second[..., None, :]).flatten(-2)
    best, indices = _best(sums, k)
    scores = (first[..., :, None] + second[..., None, :]).flatten(-2).gather(-1, indices)
    return ProductKeys(scores.masked_fill(best == -torch.inf, -torch.inf), indices)


def log_partition(first: Float[Tensor, "*batch n1"], second: Float[Tensor, "*batch n2"]) -> Float[Tensor, "*batch"]:
    """log sum_ij exp(s_i + s'_j) over all experts, exactly: the sum factorises."""
    return first.logsumexp(-1) + second.logsumexp(-1)


def coverage(scores: Float[Tensor, "*batch k"], partition: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """The share of the softmax over all experts that the retrieved ones hold, in (0, 1]."""
    return (scores.logsumexp(-1) - partition).exp().clamp_max(1.0)


def entropy(first: Float[Tensor, "*batch n1"], second: Float[Tensor, "*batch n2"]) -> Float[Tensor, "*batch"]:
    """The entropy of the softmax over all experts, in nats: i and j are independent, so theirs add up."""
    return _entropy(first) + _entropy(second)


def _entropy(scores: Tensor) -> Tensor:
    logs = scores.log_softmax(-1)
    return -(logs.exp() * logs.masked_fill(logs == -torch.inf, 0.0)).sum(-1)


def _best(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest and their places, ties to the lowest place."""
    ordered, places = values.sort(dim=-1, descending=True, stable=True)
    return ordered[..., :k], places[..., :k]


def _check(k: int, n1: int, n2: int) -> None:
    if not 1 <= k <= n1 * n2:
        raise ValueError(f"top_k={k}: expected 1 to {n1 * n2}, the experts of a grid of {n1} x {n2}.")
