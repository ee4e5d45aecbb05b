"""Average linkage against a tree drawn by hand and against scipy."""

import pytest
import torch

from mixwright.evaluation.linkage import Merge, average_linkage, cut, leaf_order


def test_a_tree_drawn_by_hand() -> None:
    # a and b at 1, c and d at 2, the pairs at 8, 10, 6 and 12: the mean of the four is 9; e is 20 from everyone.
    distances = torch.tensor(
        [[0, 1, 8, 10, 20], [1, 0, 6, 12, 20], [8, 6, 0, 2, 20], [10, 12, 2, 0, 20], [20, 20, 20, 20, 0]]
    ).float()
    merges = average_linkage(distances)
    assert merges == [Merge(0, 1, 1.0, 2), Merge(2, 3, 2.0, 2), Merge(5, 6, 9.0, 4), Merge(4, 7, 20.0, 5)]
    assert leaf_order(merges, 5) == [4, 0, 1, 2, 3]
    groups, rest = cut(merges, 5, 3)
    assert groups == [[4], [0, 1], [2, 3]]
    assert rest == [Merge(1, 2, 9.0, 4), Merge(0, 3, 20.0, 5)]
    assert cut(merges, 5, 1) == ([[4, 0, 1, 2, 3]], [])
    assert cut(merges, 5, 9)[0] == [[4], [0], [1], [2], [3]]
    assert leaf_order(cut(merges, 5, 9)[1], 5) == list(range(5))


@pytest.mark.parametrize("count", [2, 3, 24, 61])
def test_merges_are_scipys(count: int) -> None:
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    points = torch.randn(count, 4, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    merges = average_linkage(torch.cdist(points, points, p=1))
    wanted = hierarchy.linkage(torch.pdist(points, p=1).numpy(), "average")
    ours = [(merge.left, merge.right, merge.height, merge.size) for merge in merges]
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), torch.from_numpy(wanted))
    assert sorted(leaf_order(merges, count)) == list(range(count))


def test_ties_and_single_things() -> None:
    assert average_linkage(torch.zeros(1, 1)) == [] and leaf_order([], 1) == [0] and cut([], 1, 4) == ([[0]], [])
    assert [merge.height for merge in average_linkage(torch.zeros(4, 4))] == [0.0] * 3
