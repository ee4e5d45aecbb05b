import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixwright.data.domains import tensor_domain
from mixwright.data.episode_samplers import FixedEpisodes, VariableEpisodes
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


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"labels": [0, 1, 0]}, "domain x: 3 labels for 2 items"),
        ({"labels": [0, -1]}, "domain x: label -1; expected 0 to 0"),
        ({"labels": [0, 2], "class_names": ("a", "b")}, "domain x: label 2; expected 0 to 1"),
        ({"groups": ("g",)}, "domain x: 1 groups for 2 classes"),
        ({"weight": 0.0}, "domain x: weight 0"),
        ({"items": torch.tensor([[0.0], [float("nan")]])}, "domain x: item 1 has NaN or infinite values"),
        ({"items": {"a": torch.zeros(2), "b": torch.tensor([1.0, float("inf")])}}, "domain x: item 1 has NaN"),
    ],
)
def test_a_faulty_domain_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        tensor_domain("x", **{"items": torch.zeros(2, 1), "labels": [0, 1], **settings})


def test_the_digest_names_items_labels_and_names():
    base = domain().digest
    assert base == domain().digest
    others = [domain("other"), domain(first=1.0), domain(sizes=(5, 7, 6, 6)), domain(groups=("a", "a", "b", "b"))]
    assert len({base, *(other.digest for other in others)}) == 5


def variable(*domains, **settings):
    return VariableEpisodes(domains=domains or (domain(sizes=(30,) * 12),), **settings)


def test_ways_and_shots_vary_within_what_was_asked_for():
    source = variable(domain(sizes=(30, 200, 4, 12, 9, 2, 60, 30)), ways=(3, 6), queries=4, support=50, per_class=20)
    ways, shots, sizes = set(), set(), []
    for index in range(200):
        episode = source.episode(index)
        check_episode(episode)
        support, query = torch.bincount(episode.labels), torch.bincount(episode.query_labels)
        assert len(query) == len(support) and query.unique().numel() == 1 and 1 <= int(query[0]) <= 4
        values = [*episode.support.flatten().tolist(), *episode.query.flatten().tolist()]
        assert len(set(values)) == len(values)
        ways.add(len(support))
        shots.update(support.tolist())
        sizes.append(len(episode.labels))
    assert ways == {3, 4, 5, 6}
    assert min(shots) == 1 and max(shots) > 20 and len(shots) > 15  # a large class may have more than per_class
    assert max(sizes) <= 50 and min(sizes) < 10


def test_queries_are_at_most_half_of_the_smallest_class():
    source = variable(domain(sizes=(6, 7, 100)), ways=(3, 3), queries=10)
    assert {len(source.episode(index).query_labels) for index in range(10)} == {9}


def test_larger_classes_have_more_shots_and_balance_can_be_asked_for():
    source = variable(domain(sizes=(20, 80)), ways=(2, 2), imbalance=1.0)
    drawn = [source.episode(index) for index in range(40)]
    large = sum(int((one.labels == one.meta["classes"].index("1")).sum()) for one in drawn)
    assert large / sum(len(one.labels) for one in drawn) > 0.7
    alike = domain(sizes=(40, 40))
    even, tilted = (variable(alike, ways=(2, 2), imbalance=by) for by in (1.0, 2.0))
    shots = [[torch.bincount(source.episode(i).labels).tolist() for i in range(12)] for source in (even, tilted)]
    assert all(first == second for first, second in shots[0])
    assert any(first != second for first, second in shots[1])


def test_classes_of_an_episode_are_of_one_group():
    groups = ("bird/owl", "bird/owl", "bird/gull", "bird/gull", "fish", "fish")
    family = domain(sizes=(5,) * 6, groups=groups)
    seen = [set(variable(family, ways=(2, 4)).episode(index).meta["classes"]) for index in range(120)]
    birds, owls, gulls, fish = {"0", "1", "2", "3"}, {"0", "1"}, {"2", "3"}, {"4", "5"}
    assert all(classes <= birds or classes <= fish for classes in seen)
    assert owls in seen and gulls in seen and fish in seen and birds in seen
    mixed = [set(variable(family, ways=(2, 4), hierarchy=False).episode(i).meta["classes"]) for i in range(40)]
    assert any(not (classes <= birds or classes <= fish) for classes in mixed)


def test_fixed_episodes_are_of_any_classes_whatever_their_groups():
    family = domain(sizes=(5,) * 6, groups=("bird", "bird", "bird", "fish", "fish", "fish"))
    seen = [set(fixed(family).episode(index).meta["classes"]) for index in range(60)]
    within = [classes for classes in seen if classes <= {"0", "1", "2"} or classes <= {"3", "4", "5"}]
    assert 0 < len(within) < 20  # 2 of 20 choices of three classes are of one group


def test_a_domain_without_a_large_enough_group_draws_from_all_its_classes():
    lone = domain(sizes=(5,) * 6, groups=("a", "b", "c", "d", "e", "f"))
    assert {variable(lone, ways=(4, 6)).episode(index).ways for index in range(30)} == {4, 5, 6}


def test_a_domain_of_few_classes_gives_all_of_them():
    assert variable(domain(sizes=(5, 5, 1))).episode(0).ways == 2


def test_a_variable_episode_is_a_function_of_seed_and_number():
    one, same, other = (variable(seed=seed).episode(5) for seed in (0, 0, 1))
    assert torch.equal(one.support, same.support) and one.meta == same.meta
    assert one.meta["rows"] != other.meta["rows"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ways": (1, 5)}, "ways 1 to 5"),
        ({"ways": (6, 5)}, "ways 6 to 5"),
        ({"support": 20}, "support of at least 50 items"),
        ({"queries": 0}, "queries 0"),
        ({"imbalance": 0.5}, "imbalance 0.5"),
        ({"domains": (domain(sizes=(9,)),)}, "1 of its 1 classes have 2 distinct items or more"),
        ({"domains": (domain(sizes=(9, 1, 1)),)}, "1 of its 3 classes"),
        ({"domains": ()}, "no domain"),
    ],
)
def test_variable_episodes_that_cannot_be_drawn_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        VariableEpisodes(**{"domains": (domain(sizes=(9,) * 60),), **settings})


def test_classes_that_all_copy_each_other_are_refused_when_they_meet():
    items = torch.arange(6.0).repeat(3)[:, None]
    with pytest.raises(ValueError, match="all but one of its classes hold copies"):
        variable(tensor_domain("same", items, [row // 6 for row in range(18)])).episode(0)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=9), st.integers(0, 5), st.integers(2, 6), st.integers(1, 8))
def test_whatever_the_classes_episodes_are_disjoint_and_balanced_in_queries(sizes, copies, most, queries):
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    items = torch.arange(float(len(labels)))
    items[torch.randint(len(labels), (copies,), generator=torch.Generator().manual_seed(len(labels)))] = 0.0
    some = tensor_domain("any", items[:, None], labels)
    if sum(len(rows) > 1 for rows in some.rows) < 2:
        with pytest.raises(ValueError, match="distinct items or more"):
            variable(some, ways=(2, most), queries=queries, support=20)
        return
    source = variable(some, ways=(2, most), queries=queries, support=20)
    for index in range(3):
        episode = source.episode(index)
        check_episode(episode)
        values = [*episode.support.flatten().tolist(), *episode.query.flatten().tolist()]
        assert len(set(values)) == len(values) and len(episode.labels) <= 20
        assert torch.bincount(episode.query_labels).unique().numel() == 1
        assert all(sizes[int(name)] > 1 for name in episode.meta["classes"])
