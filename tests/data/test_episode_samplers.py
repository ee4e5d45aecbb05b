import pytest
import torch

from mixwright.data.domains import tensor_domain
from mixwright.data.episode_samplers import FixedEpisodes
from mixwright.data.episodes import check_episode


def domain(name="numbers", sizes=(6, 6, 6, 6), first=0.0, **settings):
    """Item i is the number `first` + i."""
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return tensor_domain(name, first + torch.arange(float(sum(sizes)))[:, None], labels, **settings)


def fixed(*domains, **settings):
    return FixedEpisodes(domains=domains or (domain(),), **{"ways": 3, "shots": 2, "queries": 3, **settings})


def test_support_and_query_hold_what_was_asked_for_and_nothing_twice():
    for index in range(30):
        episode = fixed().episode(index)
        check_episode(episode)
        assert episode.labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert torch.bincount(episode.query_labels).tolist() == [3, 3, 3]
        values = [*episode.support.flatten().tolist(), *episode.query.flatten().tolist()]
        assert len(set(values)) == len(values) == 15


def test_labels_are_those_of_the_domain():
    for index in range(10):
        episode = fixed().episode(index)
        names = [int(name) for name in episode.meta["classes"]]
        for inputs, labels in ((episode.support, episode.labels), (episode.query, episode.query_labels)):
            assert (inputs.flatten() // 6).tolist() == [names[label] for label in labels]


def test_an_episode_is_a_function_of_seed_and_number():
    forwards = [fixed().episode(index).support for index in range(5)]
    backwards = [fixed().episode(index).support for index in reversed(range(5))][::-1]
    assert all(torch.equal(one, other) for one, other in zip(forwards, backwards))
    assert not torch.equal(forwards[0], forwards[1])
    assert not torch.equal(forwards[0], fixed(seed=1).episode(0).support)


def test_domains_are_drawn_by_weight():
    pair = domain("rare", weight=1.0), domain("often", weight=3.0)
    names = [fixed(*pair).episode(index).meta["domain"] for index in range(400)]
    assert 250 < names.count("often") < 350


def test_a_class_of_too_few_items_is_never_drawn():
    source = fixed(domain(sizes=(6, 1, 2, 6, 6)))
    drawn = {name for index in range(40) for name in source.episode(index).meta["classes"]}
    assert drawn == {"0", "3", "4"}


def test_copies_count_once_and_never_stand_in_two_classes():
    items = torch.arange(24.0)[:, None]
    items[6] = items[0]  # class 1 begins with a copy of class 0's first
    items[13] = items[12]  # and class 2 has one item twice
    source = fixed(tensor_domain("copies", items, [row // 6 for row in range(24)]), shots=2, queries=9)
    assert [len(rows) for rows in source.domains[0].rows] == [6, 6, 5, 6]
    for index in range(40):
        episode = source.episode(index)
        values = [*episode.support.flatten().tolist(), *episode.query.flatten().tolist()]
        assert len(set(values)) == len(values)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ways": 5}, "4 of its 4 classes have 3 distinct items or more, and an episode needs 5"),
        ({"shots": 6}, "0 of its 4 classes have 7 distinct items or more"),
        ({"ways": 1}, "ways 1: expected 2 or more"),
        ({"shots": 0}, "shots 0"),
        ({"queries": 0}, "queries 0"),
        ({"domains": ()}, "no domain to draw episodes from"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_training(settings, said):
    with pytest.raises(ValueError, match=said):
        FixedEpisodes(**{"domains": (domain(),), "ways": 3, "shots": 2, "queries": 3, **settings})


def test_classes_that_are_copies_of_each_other_are_refused_when_they_meet():
    items = torch.arange(6.0).repeat(3)[:, None]
    source = fixed(tensor_domain("same", items, [row // 6 for row in range(18)]), ways=2)
    with pytest.raises(ValueError, match="1 classes have 3 items that no other class has"):
        source.episode(0)


def test_labels_that_do_not_go_with_the_items_are_refused():
    with pytest.raises(ValueError, match="3 labels for 2 items"):
        tensor_domain("short", torch.zeros(2, 1), [0, 1, 0])
    with pytest.raises(ValueError, match="label -1"):
        tensor_domain("negative", torch.zeros(2, 1), [0, -1])


def test_the_digest_names_items_labels_and_names():
    base = domain().digest
    assert base == domain().digest
    others = [domain("other"), domain(first=1.0), domain(sizes=(5, 7, 6, 6)), domain(groups=("a", "a", "b", "b"))]
    assert len({base, *(other.digest for other in others)}) == 5
