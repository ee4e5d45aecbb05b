"""The k largest of all sums a_i + b_j, in plain torch: a look at the few pairs that can win.

What comes out is what a stable sort of all sums gives, ids i * n2 + j and rounding included. `torch.topk` promises no
order among equals, so that it decides only rows without any; the others, on a CPU few, are sorted. Under torch.compile
equals that only rounding makes go to the lowest id of the staircase.
"""

from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor


def staircase(k: int, n1: int, n2: int) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """Ranks (i, j), counted from 0, of the pairs that can be among the k best: (i + 1) (j + 1) <= k.

    A pair is beaten by all (i + 1) (j + 1) - 1 pairs of no lower ranks. Each of these can win: there are 50 at k = 16.
    """
    return _ranks([(i, j) for i in range(min(k, n1)) for j in range(min(k // (i + 1), n2))])


def corners(k: int, n1: int, n2: int) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """The nearest pairs outside of the staircase: what they don't reach, no other pair does."""
    found: list[tuple[int, int]] = []
    for i in range(min(k + 1, n1)):
        j = k // (i + 1)
        if j < n2 and (not found or j < found[-1][1]):
            found.append((i, j))
    return _ranks(found)


def _ranks(pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    first, second = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(-1)
    return first, second


_staircase_kept, _corners_kept = cache(staircase), cache(corners)  # ranks depend on sizes only, nobody writes to them


def _plan(k: int, n1: int, n2: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    if torch.compiler.is_compiling():
        return staircase(k, n1, n2), corners(k, n1, n2)
    return _staircase_kept(k, n1, n2), _corners_kept(k, n1, n2)


def best_sums(
    first: Float[Tensor, "rows n1"], second: Float[Tensor, "rows n2"], k: int
) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]:
    """The k largest sums of each row, the best first, and their ids; ties to the lowest id."""
    if not first.is_cpu or torch.compiler.is_compiling():  # asking which rows have equals would wait for the device
        return _sorted(first, second, k)
    sums, ids, tied = _quick(first, second, k)
    rows = tied.nonzero()[:, 0]
    if len(rows):
        sums[rows], ids[rows] = _sorted(first[rows], second[rows], k)
    return sums, ids


def _quick(first: Tensor, second: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same for rows without equals, and which rows may have some."""
    n1, n2 = first.shape[1], second.shape[1]
    (a, rows), (b, columns) = first.topk(min(k, n1)), second.topk(min(k, n2))  # k + 1 can take torch twice as long
    i, j = _staircase_kept(k + 1, min(k, n1), min(k, n2))  # k + 1 of these beat, or equal, any other of such ranks
    best, order = (a[:, i] + b[:, j]).topk(min(k + 1, len(i)))
    together = torch.cat([a, b, best], 1)
    tied = (together[:, 1:] == together[:, :-1]).any(1)
    sums, order = best[:, :k], order[:, :k]
    for half, mine, other in ((first, a, b), (second, b, a)):
        if k < half.shape[1]:
            _follows(tied, half, mine, other[:, 0], sums[:, -1])
    return sums, rows.gather(1, i[order]) * n2 + columns.gather(1, j[order]), tied


def _follows(tied: Tensor, half: Tensor, best: Tensor, other: Tensor, last: Tensor) -> None:
    """Mark rows in which what follows the k best of a half reaches the last sum; most often even the k-th does not."""
    near = (best[:, -1] + other >= last).nonzero()[:, 0]
    if len(near):
        following = half[near].topk(best.shape[1] + 1).values[:, -1]
        tied[near] |= following + other[near] >= last[near]


def _sorted(first: Tensor, second: Tensor, k: int) -> tuple[Tensor, Tensor]:
    n1, n2 = first.shape[1], second.shape[1]
    (a, rows), (b, columns) = (half.sort(dim=1, descending=True, stable=True) for half in (first, second))
    (i, j), (outer_i, outer_j) = ((p.to(first.device), q.to(first.device)) for p, q in _plan(k, n1, n2))
    sums, ids = a[:, i] + b[:, j], rows[:, i] * n2 + columns[:, j]
    ids, by_id = ids.sort(dim=1)
    sums, order = sums.gather(1, by_id).sort(dim=1, descending=True, stable=True)
    sums, ids = sums[:, :k], ids.gather(1, order)[:, :k].contiguous()
    if torch.compiler.is_compiling():
        return sums, ids
    # Equal sums of unequal halves: rounding may give a pair outside of the staircase the lower id.
    constant = (a[:, 0] == a[:, min(k, n1 - 1)]) & (b[:, 0] == b[:, min(k, n2 - 1)])
    reached = (a[:, outer_i] + b[:, outer_j] == sums[:, -1:]).any(1) & ~constant
    for row in reached.nonzero()[:, 0].tolist():
        _settle(first[row], second[row], sums[row], ids[row])
    return sums, ids


def _settle(first: Tensor, second: Tensor, sums: Tensor, ids: Tensor) -> None:
    """Give the places of the last sum to the lowest ids that have it, wherever they lie."""
    last = sums[-1]
    above = int((sums > last).sum())
    rows = (first + second.max() >= last).nonzero()[:, 0]
    hits = (first[rows, None] + second == last).nonzero()[: len(ids) - above]
    ids[above : above + len(hits)] = rows[hits[:, 0]] * len(second) + hits[:, 1]
