"""The choice between paths: a function of shapes, sane at its ends."""

from mixwright.ops.cost import cheaper_one_by_one, expected_chosen


def test_one_token_goes_one_by_one_and_many_tokens_in_groups():
    for experts in (2, 8, 36, 166, 1000):
        assert cheaper_one_by_one(1, 2, experts=experts, rank=16, width=4096)
        assert not cheaper_one_by_one(512, 2, experts=experts, rank=16, width=4096)


def test_expected_number_of_chosen_experts():
    assert expected_chosen(0, 7) == 0
    assert expected_chosen(5, 1) == 1
    assert abs(expected_chosen(2, 4) - 1.75) < 1e-12
