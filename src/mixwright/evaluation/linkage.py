"""Which things are alike, as a tree: agglomerative clustering by average linkage."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Merge:
    """Two clusters become one: things are 0..n-1, the cluster made by merge i is n+i, as in scipy's linkage."""

    left: int
    right: int
    height: float
    size: int


def average_linkage(distances: Float[Tensor, "things things"]) -> list[Merge]:
    """UPGMA (Sokal and Michener 1958): the two clusters whose members are nearest on average merge, until one is left.

    n-1 merges with heights that never fall; ties go to the clusters with the lowest numbers. `distances` is symmetric.
    """
    between = distances.detach().double().clone()
    between.fill_diagonal_(float("inf"))
    count = len(between)
    clusters, sizes, merges = list(range(count)), [1] * count, list[Merge]()
    for _ in range(count - 1):
        first, second = sorted(divmod(int(between.argmin()), count))
        height, joined = float(between[first, second]), sizes[first] + sizes[second]
        left, right = sorted((clusters[first], clusters[second]))
        merges.append(Merge(left, right, height, joined))
        row = (sizes[first] * between[first] + sizes[second] * between[second]) / joined
        row[first] = float("inf")
        between[first], between[:, first] = row, row
        between[second], between[:, second] = float("inf"), float("inf")
        clusters[first], sizes[first] = count + len(merges) - 1, joined
    return merges


def leaf_order(merges: Sequence[Merge], count: int) -> list[int]:
    """The things from one end of the tree to the other, so that no two branches cross."""
    members = [[thing] for thing in range(count)]
    for merge in merges:
        members.append(members[merge.left] + members[merge.right])
    return members[-1] if members else []


def cut(merges: Sequence[Merge], count: int, clusters: int) -> tuple[list[list[int]], list[Merge]]:
    """The tree cut into at most `clusters` clusters, in the tree's order with their members in that order, and the
    rest of the tree over these."""
    kept = max(1, min(clusters, count))
    members = {thing: [thing] for thing in range(count)}
    for number, merge in enumerate(merges[: count - kept]):
        members[count + number] = members.pop(merge.left) + members.pop(merge.right)
    place = {thing: at for at, thing in enumerate(leaf_order(merges, count))}
    found = sorted(members.items(), key=lambda item: place[item[1][0]])
    numbers = {cluster: at for at, (cluster, _) in enumerate(found)}
    numbers |= {count + number: kept + number - (count - kept) for number in range(count - kept, len(merges))}
    rest = [replace(m, left=numbers[m.left], right=numbers[m.right]) for m in merges[count - kept :]]
    return [group for _, group in found], rest
