"""The k largest, with ties to the lowest index."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixwright.ops.top_k import top_k


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n), st.integers(0, 9999))))
def test_ties_go_to_the_lowest_index(drawn):
    experts, k, seed = drawn
    scores = torch.randint(0, 3, (5, experts), generator=torch.Generator().manual_seed(seed)).float()
    scores[scores == 0] = -torch.inf
    values, indices = top_k(scores, k)
    for row, found, value in zip(scores.tolist(), indices.tolist(), values.tolist(), strict=True):
        expected = sorted(range(experts), key=lambda e: (-row[e], e))[:k]
        assert found == expected
        assert value == [row[e] for e in expected]


@pytest.mark.parametrize("k", [2, 5])
def test_values_carry_gradients(k):
    scores = torch.tensor([[1.0, 3.0, 3.0, -torch.inf, 2.0]], requires_grad=True)
    values, _ = top_k(scores, k)
    values[:, :2].sum().backward()
    assert scores.grad.tolist() == [[0.0, 1.0, 1.0, 0.0, 0.0]]


def test_more_than_the_pool_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="top_k=4 is larger than the pool of 3 experts"):
        top_k(torch.zeros(2, 3), 4)


def test_a_score_below_every_finite_number_is_not_taken_twice():
    scores = torch.tensor([[5.0, -torch.inf, -torch.inf]])
    assert top_k(scores, 3)[1].tolist() == [[0, 1, 2]]
