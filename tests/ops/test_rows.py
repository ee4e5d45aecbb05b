import pytest
import torch

from mixwright.ops.rows import count, join, move, take


def test_rows_of_a_tensor_and_of_a_mapping_are_taken_alike():
    images, ids = torch.arange(12).reshape(4, 3), {"input_ids": torch.arange(8).reshape(4, 2)}
    assert torch.equal(take(images, [2, 0, 2]), images[[2, 0, 2]])
    assert torch.equal(take(ids, torch.tensor([3, 1]))["input_ids"], ids["input_ids"][[3, 1]])
    assert take(images, slice(1, 3)).data_ptr() == images[1:].data_ptr()
    assert take(images, []).shape == (0, 3)


def test_joined_texts_are_as_wide_as_the_wider_and_the_padding_is_masked():
    short = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
    long = {"input_ids": torch.tensor([[7, 8, 9]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    both = join(short, long)
    assert both["input_ids"].tolist() == [[5, 6, 0], [7, 8, 9]]
    assert both["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert join(long, short)["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 9, 8), r"shape \(3, 8, 8\) and of shape \(3, 9, 8\)"),
        ({"input_ids": torch.zeros(1, 2)}, {"input_ids": torch.zeros(1, 3)}, "do not go"),
        ({"a": torch.zeros(1)}, {"b": torch.zeros(1)}, "have a and b"),
    ],
)
def test_rows_that_do_not_go_together_are_refused(first, second, said):
    with pytest.raises(ValueError, match=said):
        join(first, second)


def test_a_tensor_does_not_join_a_mapping():
    with pytest.raises(TypeError, match="expected two of one kind"):
        join(torch.zeros(1), {"a": torch.zeros(1)})


def test_rows_are_counted_and_must_agree():
    assert count(torch.zeros(3, 2)) == 3
    assert count({"a": torch.zeros(2), "b": torch.zeros(2, 5)}) == 2
    with pytest.raises(ValueError, match="a 2, b 3"):
        count({"a": torch.zeros(2), "b": torch.zeros(3)})
    with pytest.raises(ValueError, match="no tensor at all"):
        count({})
    with pytest.raises(ValueError, match="a single number"):
        count(torch.tensor(1.0))


def test_moving_keeps_the_kind_of_the_inputs():
    assert move(torch.zeros(2), "meta").device.type == "meta"
    assert move({"a": torch.zeros(2)}, "meta")["a"].device.type == "meta"
