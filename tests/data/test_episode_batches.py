import pytest
import torch

from mixwright.data.domains import tensor_domain
from mixwright.data.episode_batches import episode_batches, held_out_batches, support_batches
from mixwright.data.episode_samplers import FixedEpisodes


def domain(name):
    return tensor_domain(name, torch.arange(24.0)[:, None], [row // 6 for row in range(24)])


def source(name, seed=0):
    return FixedEpisodes(domains=[domain(name)], ways=3, shots=1, queries=2, seed=seed)


def test_batch_n_is_episode_n_without_end():
    batches = episode_batches(source("a"), length=24, digest="d")
    assert (len(batches), batches.digest, batches.batch_size) == (24, "d", 1)
    for index in (0, 5, 1000):
        assert torch.equal(batches.batch(index).support, source("a").episode(index).support)
    assert batches.batch(3).weight == 1 and batches.batch(3).where == ("a#3",)


def test_held_out_episodes_are_the_same_each_time_and_told_apart_by_domain():
    batches = held_out_batches({"a": source("a"), "b": source("b", 1)}, 3)
    assert batches.tasks == {"a": 3, "b": 3}
    parts = batches.in_order()
    assert [batches.task_of(part) for part in parts] == ["a"] * 3 + ["b"] * 3
    assert [batches.take(part).meta["domain"] for part in parts] == ["a"] * 3 + ["b"] * 3
    assert [batches.take(part).meta["index"] for part in parts] == [0, 1, 2, 0, 1, 2]
    assert torch.equal(batches.take(parts[4]).query, source("b", 1).episode(1).query)
    mine = [batches.task_of(part) for part in batches.in_order(1, 2)]  # of the second of two processes
    assert mine == ["a", "b", "b"]


def test_a_new_task_is_an_episode_that_is_all_support():
    batches = support_batches({"one": domain("one"), "two": domain("two")})
    episode = batches.take(batches.in_order()[1])
    assert batches.tasks == {"one": 1, "two": 1} and episode.meta["domain"] == "two"
    assert torch.equal(episode.support, episode.query) and torch.equal(episode.labels, episode.query_labels)
    assert episode.labels.bincount().tolist() == [6] * 4


def test_an_episode_beyond_the_last_held_out_one_is_nobody_s():
    with pytest.raises(IndexError):
        held_out_batches({"a": source("a")}, 2).batch(2)
