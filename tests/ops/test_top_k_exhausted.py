"""Fewer experts above -inf than are asked for: nobody is chosen twice."""

import pytest
import torch

from mixwright.ops.top_k import top_k
from mixwright.routers.token import choose


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_nobody_is_chosen_twice_when_scores_run_out(k: int) -> None:
    scores = torch.tensor([[2.0, -torch.inf, 1.0, -torch.inf, -torch.inf, -torch.inf]])
    values, _ = top_k(scores, k)
    assert values[0].tolist() == [2.0, 1.0] + [-torch.inf] * (k - 2)
    weights = choose(scores, k).dense()
    torch.testing.assert_close(weights, torch.softmax(scores, -1))
