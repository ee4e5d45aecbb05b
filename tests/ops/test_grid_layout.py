import pytest
import torch

from mixwright.ops.grid_layout import balanced_assignment, clusters, grid_layout, near_square


@pytest.mark.parametrize("count", [1, 2, 47, 48, 64, 97, 512, 1031, 14336])
def test_a_grid_has_room_for_all_and_is_not_thin(count):
    n1, n2 = near_square(count)
    assert count <= n1 * n2 < count + max(n1, n2)
    assert max(n1, n2) <= 4 * min(n1, n2) or count < 3


def test_the_squarest_of_the_smallest_grids_is_taken():
    assert near_square(64) == (8, 8)
    assert near_square(97) in ((7, 14), (14, 7))
    assert near_square(60, multiple=4)[0] % 4 == 0


def test_nobody_would_rather_change_places():
    scores = torch.randn(3, 40, 9, generator=torch.Generator().manual_seed(0))
    found = balanced_assignment(scores, 5)
    for own, bins in zip(scores, found):
        assert torch.bincount(bins, minlength=9).max() <= 5
        for item, at in enumerate(bins.tolist()):
            for other in range(9):
                members = (bins == other).nonzero().flatten()
                if float(own[item, other]) > float(own[item, at]):
                    assert len(members) == 5 and float(own[members, other].min()) >= float(own[item, other])


def test_items_without_room_are_refused():
    with pytest.raises(ValueError, match="7 items do not fit into 2 bins of 3"):
        balanced_assignment(torch.zeros(7, 2), 3)


def test_clusters_are_found_and_are_of_one_size():
    draw = torch.Generator().manual_seed(1)
    centres = torch.eye(4, 16)
    vectors = centres.repeat_interleave(8, 0) + 0.05 * torch.randn(32, 16, generator=draw)
    found = clusters(vectors[torch.randperm(32, generator=draw)], 4, draw)
    assert torch.bincount(found, minlength=4).tolist() == [8, 8, 8, 8]


@pytest.mark.parametrize("count", [24, 23, 19])
def test_every_vector_has_a_cell_of_its_own(count):
    vectors = torch.randn(count, 5, generator=torch.Generator().manual_seed(2))
    places = grid_layout(vectors, (4, 6), torch.Generator().manual_seed(0))
    assert len(places.unique()) == count and int(places.min()) >= 0 and int(places.max()) < 24


def test_sums_over_two_axes_are_laid_out_by_their_axes():
    """Vectors a_i + b_j, shuffled: those that share a_i land in a row, and those that share b_j in a column."""
    draw = torch.Generator().manual_seed(3)
    rows, columns = torch.eye(24)[:4] * 3, torch.eye(24)[4:10]
    order = torch.randperm(24, generator=draw)
    vectors = (rows[:, None] + columns).flatten(0, 1)[order]
    found = [grid_layout(vectors, (4, 6), torch.Generator().manual_seed(seed)) for seed in range(4)]
    best = max(_agreement(places, order) for places in found)
    assert best == 1.0


def _agreement(places, order):
    i, j = order // 6, order % 6
    return (
        float(
            sum(len(i[places // 6 == row].unique()) == 1 for row in range(4))
            + sum(len(j[places % 6 == column].unique()) == 1 for column in range(6))
        )
        / 10
    )
