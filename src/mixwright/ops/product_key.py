"""The top k of n1 * n2 sums without looking at all of them, and exact sums over all of them at the cost of n1 + n2.

The key of expert (i, j) is two sub-keys side by side, so its score is a sum s_i + s'_j (Lample et al. 2019, section
3.2; He 2024, section 2.2). Experts go by id = i * n2 + j.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mixwright.ops import kernels
from mixwright.ops.best_sums import best_sums
from mixwright.ops.best_sums import staircase as staircase


class ProductKeys(NamedTuple):
    """The retrieved experts: `scores` `(*batch, k)` without selection bias, and their ids, the best first."""

    scores: Tensor
    indices: Tensor


def product_key_top_k(
    first: Float[Tensor, "*batch n1"],
    second: Float[Tensor, "*batch n2"],
    k: int,
    first_bias: Float[Tensor, "*#batch n1"] | None = None,
    second_bias: Float[Tensor, "*#batch n2"] | None = None,
) -> ProductKeys:
    """The k experts with the largest sums, ties to the lowest id; biases count for the choice and not in the scores.

    Exactly what a stable sort of all n1 * n2 sums would give, rounding included. A bias of -inf keeps a sub-key out;
    where fewer than k experts remain, the rest has the score -inf. Scores that are no numbers make no promise beyond
    ids that exist. Raises ValueError unless 1 <= k <= n1 * n2.
    """
    batch, n1, n2 = first.shape[:-1], first.shape[-1], second.shape[-1]
    check_top_k(k, n1, n2)
    first, second = (wide(half).reshape(-1, half.shape[-1]) for half in (first, second))
    biases = tuple(_bias_rows(bias, batch) for bias in (first_bias, second_bias))
    wanted = torch.is_grad_enabled() and (first.requires_grad or second.requires_grad)
    with torch.no_grad():
        found = top_k_native(first, second, k, *biases) or _top_k(first, second, k, *biases)
    scores, ids = found
    if wanted:
        summed = first.gather(1, ids // n2) + second.gather(1, ids % n2)
        scores = summed.masked_fill(scores == -torch.inf, -torch.inf)
    return ProductKeys(scores.view(*batch, k), ids.view(*batch, k))


def _top_k(
    first: Tensor, second: Tensor, k: int, first_bias: Tensor | None, second_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scores and ids of rows; row r has row r, modulo how many there are, of a bias."""
    if first_bias is None and second_bias is None:
        return best_sums(first, second, k)
    chosen = [
        half if bias is None else half + bias.repeat(len(half) // len(bias), 1)
        for half, bias in ((first, first_bias), (second, second_bias))
    ]
    sums, ids = best_sums(chosen[0], chosen[1], k)
    scores = first.gather(1, ids // second.shape[1]) + second.gather(1, ids % second.shape[1])
    return scores.masked_fill_(sums == -torch.inf, -torch.inf), ids


def top_k_native(
    first: Tensor, second: Tensor, k: int, first_bias: Tensor | None = None, second_bias: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """The same by the compiled twin; None where it does not take these tensors."""
    tensors = [t for t in (first, second, first_bias, second_bias) if t is not None]
    native = kernels.kernel() if plain_floats(*tensors) and max(first.shape[1], second.shape[1]) < 1 << 31 else None
    if native is None or not len(first):
        return None
    scores, ids = first.new_empty(len(first), k), first.new_empty(len(first), k, dtype=torch.int64)
    top_k_into(native, scores, ids, first, second, first_bias, second_bias)
    return scores, ids


def top_k_into(
    native: kernels.Kernels,
    scores: Tensor,
    ids: Tensor,
    first: Tensor,
    second: Tensor,
    first_bias: Tensor | None,
    second_bias: Tensor | None,
) -> None:
    """Write scores and ids `(rows, k)`, of which rows may lie apart but alike in both."""
    failed = native.product_key(
        *(0 if t is None else t.data_ptr() for t in (scores, ids, first, second, first_bias, second_bias)),
        *(len(first), first.stride(0), second.stride(0), scores.stride(0)),
        *(0 if bias is None else len(bias) for bias in (first_bias, second_bias)),
        *(first.shape[1], second.shape[1], scores.shape[1]),
    )
    if failed:
        raise MemoryError(f"no memory for the {scores.shape[1]} best of a row of {first.shape[1]}")


def product_key_top_k_reference(
    first: Float[Tensor, "*batch n1"],
    second: Float[Tensor, "*batch n2"],
    k: int,
    first_bias: Float[Tensor, "*#batch n1"] | None = None,
    second_bias: Float[Tensor, "*#batch n2"] | None = None,
) -> ProductKeys:
    """The same by looking at all n1 * n2 sums."""
    check_top_k(k, first.shape[-1], second.shape[-1])
    chosen_first = first if first_bias is None else first + first_bias
    chosen_second = second if second_bias is None else second + second_bias
    sums = (chosen_first[..., :, None] + chosen_second[..., None, :]).flatten(-2)
    best, indices = sums.sort(dim=-1, descending=True, stable=True)
    best, indices = best[..., :k], indices[..., :k]
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


def only_best(scores: Tensor, bias: Tensor | None, m: int) -> Tensor:
    """`bias` for the m best sub-keys of each row, with it, and -inf for the others."""
    biased = scores if bias is None else scores + bias
    kept = biased.topk(min(m, scores.shape[-1]), -1).indices
    chosen = torch.full_like(scores, -torch.inf).scatter(-1, kept, 0.0)
    return chosen if bias is None else chosen + bias


def wide(scores: Tensor) -> Tensor:
    """In float32 at least."""
    return scores.float() if scores.dtype.itemsize < 4 else scores


def plain_floats(*tensors: Tensor) -> bool:
    """Whether a compiled twin takes these: float32 on a CPU with rows as they lie, and nothing that watches."""
    if torch.compiler.is_compiling():
        return False
    return all(
        t.dtype == torch.float32 and t.is_cpu and t.stride(-1) == 1 and type(t) in (Tensor, torch.nn.Parameter)
        for t in tensors
    )


def check_top_k(k: int, n1: int, n2: int) -> None:
    """Raise ValueError unless k experts can be retrieved."""
    if not 1 <= k <= n1 * n2:
        raise ValueError(f"top_k={k}: expected 1 to {n1 * n2}, the experts of a grid of {n1} x {n2}.")


def _bias_rows(bias: Tensor | None, batch: torch.Size) -> Tensor | None:
    """One row for all, one for each place of the last axis of `batch`, or one for each row."""
    if bias is None:
        return None
    bias = wide(bias.detach())
    if bias.numel() == bias.shape[-1] or (batch and bias.shape[:-1].numel() == bias.shape[-2] == batch[-1]):
        return bias.reshape(-1, bias.shape[-1]).contiguous()
    return bias.expand(*batch, bias.shape[-1]).reshape(-1, bias.shape[-1])
