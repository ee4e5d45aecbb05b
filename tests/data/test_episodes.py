import pytest
import torch

from mixwright.data.episodes import Episode, check_episode, check_support

IMAGES, LABELS = torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])


def episode(**changes):
    given = {"support": IMAGES, "labels": LABELS, "query": IMAGES[:2], "query_labels": LABELS[:2]}
    return Episode(**{**given, **changes}, meta={"domain": "glyphs", "index": 7})


def test_an_episode_counts_once_and_says_where_it_is_from():
    one = episode()
    assert (one.weight, one.ways, one.where) == (1, 2, ("glyphs#7",))
    assert one.support_set.labels is LABELS
    assert Episode(IMAGES, LABELS, IMAGES).where == ("episode#?",)
    check_episode(one)


def test_an_episode_moves_with_all_its_tensors():
    moved = episode(support={"input_ids": torch.zeros(4, 5)}, query={"input_ids": torch.zeros(2, 9)}).to("meta")
    assert moved.support["input_ids"].device.type == moved.query["input_ids"].device.type == "meta"
    assert moved.labels.device.type == moved.query_labels.device.type == "meta"
    assert episode(query_labels=None).to("meta").query_labels is None


def test_texts_of_the_query_may_be_longer_and_classes_unbalanced():
    check_episode(episode(support={"input_ids": torch.zeros(4, 5)}, query={"input_ids": torch.zeros(2, 9)}))
    check_support(IMAGES, torch.tensor([0, 1, 1, 1]))


BROKEN = torch.zeros(4, 3, 8, 8)
BROKEN[2, 0, 1, 1] = torch.nan


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"support": IMAGES[:0], "labels": LABELS[:0]}, "glyphs#7: support: empty"),
        ({"query": IMAGES[:0], "query_labels": LABELS[:0]}, "glyphs#7: query: empty"),
        ({"support": BROKEN}, "item 2 has NaN"),
        ({"query": BROKEN[1:3]}, "query: item 1 has NaN"),
        ({"labels": LABELS[:3]}, r"shape \(3,\) for 4 items"),
        ({"labels": LABELS[:, None]}, r"shape \(4, 1\)"),
        ({"labels": torch.tensor([0, -1, 0, 1])}, "labels has -1"),
        ({"labels": torch.zeros(4, dtype=torch.long)}, "every label is 0"),
        ({"labels": torch.tensor([0, 2, 0, 2])}, "class 1 has no item in the support"),
        ({"query_labels": torch.tensor([0, 2])}, "query_labels has 2; the support has classes 0 to 1"),
        ({"query": torch.zeros(2, 3, 9, 8)}, r"query items of shape \(3, 9, 8\), support items of \(3, 8, 8\)"),
        ({"query": {"input_ids": torch.zeros(2, 9)}}, "of two kinds"),
    ],
)
def test_a_faulty_episode_is_named(changes, said):
    with pytest.raises(ValueError, match=said):
        check_episode(episode(**changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"support": ["a", "b"]}, "support: a list; expected a tensor"),
        ({"support": {"input_ids": "a text"}}, r"support\['input_ids'\]: 'a text'"),
        ({"labels": LABELS.float()}, "expected whole numbers"),
        ({"labels": [0, 1, 0, 1]}, "labels: a list"),
    ],
)
def test_an_episode_of_other_things_than_tensors_is_refused(changes, said):
    with pytest.raises(TypeError, match=said):
        check_episode(episode(**changes))
