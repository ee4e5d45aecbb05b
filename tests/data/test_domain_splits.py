import pytest
import torch

from mixwright.data.domain_splits import split_classes, split_items
from mixwright.data.domains import Domain, tensor_domain


def domain(sizes=(6,) * 10):
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    groups = tuple(f"g{label % 2}" for label in range(len(sizes)))
    return tensor_domain("d", torch.arange(float(sum(sizes)))[:, None], labels, groups=groups)


def test_classes_are_on_one_side_with_their_items_names_and_groups():
    first, second = split_classes(domain(), 0.3)
    assert (len(first.class_names), len(second.class_names)) == (7, 3)
    assert not set(first.class_names) & set(second.class_names)
    for part in (first, second):
        assert [int(item) // 6 for item in part.items] == [int(part.class_names[label]) for label in part.labels]
        assert part.groups == tuple(f"g{int(name) % 2}" for name in part.class_names)
        assert part.contents == [part.keys[row] for row in range(len(part))]


def test_a_split_follows_from_the_seed():
    assert split_classes(domain(), 0.3)[1].class_names == split_classes(domain(), 0.3)[1].class_names
    assert len({split_classes(domain(), 0.3, seed)[1].class_names for seed in range(5)}) > 1


def test_copies_are_never_on_both_sides():
    items = [f"text {number % 9}" for number in range(60)]  # many copies, across classes
    copies = Domain("d", items, [row // 6 for row in range(60)], tuple("abcdefghij"))
    for split in (split_classes, split_items):
        first, second = split(copies, 0.4)
        assert not set(first.items) & set(second.items)


def test_items_are_shared_out_within_each_class():
    first, second = split_items(domain((10, 5, 5, 2)), 0.4)
    assert [len(rows) for rows in first.rows] == [6, 3, 3, 1]
    assert [len(rows) for rows in second.rows] == [4, 2, 2, 1]
    assert first.class_names == second.class_names
    assert not set(first.items.flatten().tolist()) & set(second.items.flatten().tolist())


@pytest.mark.parametrize("share", [0.0, 0.05, 0.95])
def test_a_part_of_fewer_than_two_classes_is_refused(share):
    with pytest.raises(ValueError, match="both parts need two"):
        split_classes(domain(), share)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_part_without_items_is_refused(share):
    with pytest.raises(ValueError, match="more than 0 and less than 1"):
        split_items(domain(), share)
