"""Unevenness and Gini's coefficient at their ends and against what they are defined by."""

import math

import pytest
import torch

from mixwright.ops.k_means import k_means
from mixwright.ops.spread import gini, unevenness


def test_equal_loads_are_even_and_one_alone_is_as_uneven_as_can_be() -> None:
    equal, alone = torch.full((9,), 3.0), torch.tensor([0.0, 7.0, 0.0, 0.0])
    assert float(unevenness(equal)) == pytest.approx(0.0, abs=1e-12)
    assert float(gini(equal)) == pytest.approx(0.0, abs=1e-12)
    assert float(unevenness(alone)) == pytest.approx(math.log(4))
    assert float(gini(alone)) == pytest.approx(1 - 1 / 4)


def test_nothing_counted_is_even() -> None:
    assert unevenness(torch.zeros(2, 5)).tolist() == [0.0, 0.0]
    assert gini(torch.zeros(2, 5, dtype=torch.int64)).tolist() == [0.0, 0.0]


def test_against_their_definitions() -> None:
    load = torch.rand(3, 17, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares = load / load.sum(-1, keepdim=True)
    divergence = (shares * (shares * 17).log()).sum(-1)
    torch.testing.assert_close(unevenness(load), divergence)
    differences = (load[:, :, None] - load[:, None]).abs().mean((-2, -1)) / (2 * load.mean(-1))
    torch.testing.assert_close(gini(load), differences)


def test_k_means_finds_clusters_and_repeats_itself() -> None:
    generator = torch.Generator().manual_seed(1)
    middles = torch.tensor([[5.0, 0.0], [-5.0, 0.0], [0.0, 5.0]])
    points = (middles[:, None] + 0.1 * torch.randn(3, 20, 2, generator=generator)).flatten(0, 1)
    centres = k_means(points, 3, seed=4)
    assert float(torch.cdist(middles, centres).min(-1).values.max()) < 0.2
    assert torch.equal(centres, k_means(points, 3, seed=4))


def test_k_means_of_equal_points_and_of_too_few() -> None:
    assert torch.equal(k_means(torch.ones(4, 2), 3, seed=0), torch.ones(3, 2))
    with pytest.raises(ValueError, match="5 centres of 4 points"):
        k_means(torch.ones(4, 2), 5, seed=0)
