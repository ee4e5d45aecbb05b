"""Cells of a grid for vectors: those that lie close share a row or a column, by balanced k-means on two levels."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

_ROUNDS = 12


def near_square(count: int, multiple: int = 1) -> tuple[int, int]:
    """A grid (n1, n2) of at least `count` cells with n1 a multiple of `multiple`: the fewest cells, then the squarest.

    The longer side is at most four times the shorter one, unless `multiple` asks for more.
    """
    side = math.isqrt(count - 1) + 1
    least = max(1, -(-side // 2))
    firsts = [n for n in range(least, 2 * side + 1) if n % multiple == 0] or [multiple]
    grids = [(n1, -(-count // n1)) for n1 in firsts]
    return min(grids, key=lambda grid: (grid[0] * grid[1], max(grid) / min(grid), grid))


def balanced_assignment(scores: Float[Tensor, "*batch items bins"], capacity: int) -> Int[Tensor, "*batch items"]:
    """A bin for every item, at most `capacity` in each, such that no item and bin would both rather have each other.

    Items ask for bins from their best on; a full bin keeps those that score best (Gale and Shapley 1962).
    """
    items, bins = scores.shape[-2:]
    if items > bins * capacity:
        raise ValueError(f"{items} items do not fit into {bins} bins of {capacity}.")
    wishes = scores.clone()
    while True:
        wanted = wishes.argmax(-1)
        asked = torch.full_like(scores, -torch.inf).scatter(-1, wanted[..., None], wishes.gather(-1, wanted[..., None]))
        best = asked.topk(min(capacity, items), dim=-2)
        held = torch.zeros_like(asked, dtype=torch.bool).scatter(-2, best.indices, best.values > -torch.inf)
        refused = (asked > -torch.inf) & ~held
        if not refused.any():
            return wanted
        wishes = wishes.masked_fill(refused, -torch.inf)


def clusters(vectors: Float[Tensor, "items width"], bins: int, generator: torch.Generator) -> Int[Tensor, " items"]:
    """Balanced k-means by cosine: the cluster of each vector, none larger than the others but for the last few."""
    unit = torch.nn.functional.normalize(vectors.float(), dim=-1)
    capacity = -(-len(unit) // bins)
    centres = unit[torch.randperm(len(unit), generator=generator)[:bins].to(unit.device)]
    assigned = None
    for _ in range(_ROUNDS):
        found = balanced_assignment(unit @ centres.T, capacity)
        if assigned is not None and torch.equal(found, assigned):
            break
        assigned = found
        centres = torch.zeros_like(centres).index_add_(0, found, unit)
        centres = torch.nn.functional.normalize(centres, dim=-1)
    assert assigned is not None
    return assigned


def grid_layout(
    vectors: Float[Tensor, "items width"], grid: tuple[int, int], generator: torch.Generator
) -> Int[Tensor, " items"]:
    """The cell (id = i * n2 + j) of each vector: i is its cluster, j what its difference to the cluster's mean is like.

    Columns are clusters too, over all rows, with one place in each row.
    """
    n1, n2 = grid
    unit = torch.nn.functional.normalize(vectors.float(), dim=-1)
    first = clusters(unit, n1, generator)
    sums = unit.new_zeros(n1, unit.shape[1]).index_add_(0, first, unit)
    counts = torch.bincount(first, minlength=n1).clamp_min(1)
    rest = unit - (sums / counts[:, None])[first]
    members, present = _padded(first, n1, n2)
    parts = rest[members] * present[..., None]
    columns = rest[torch.randperm(len(rest), generator=generator)[:n2].to(rest.device)]
    if len(columns) < n2:
        columns = torch.cat([columns, rest.new_zeros(n2 - len(columns), rest.shape[1])])
    second = torch.zeros_like(members)
    for _ in range(_ROUNDS):
        found = balanced_assignment(torch.einsum("ijd,cd->ijc", parts, columns), 1)
        if torch.equal(found, second):
            break
        second = found
        columns = torch.zeros_like(columns).index_add_(0, second.flatten(), parts.flatten(0, 1))
        columns = torch.nn.functional.normalize(columns, dim=-1)
    cells = torch.arange(n1, device=first.device)[:, None] * n2 + second
    places = torch.empty_like(first)
    places[members[present]] = cells[present]
    return places


def _padded(first: Tensor, n1: int, n2: int) -> tuple[Tensor, Tensor]:
    """The items of each row, (n1, n2), and which of these entries are items."""
    members = torch.zeros(n1, n2, dtype=torch.long, device=first.device)
    present = torch.zeros(n1, n2, dtype=torch.bool, device=first.device)
    order, counts = first.argsort(stable=True), torch.bincount(first, minlength=n1)
    rank = torch.arange(len(first), device=first.device) - (counts.cumsum(0) - counts)[first[order]]
    members[first[order], rank] = order
    present[first[order], rank] = True
    return members, present
