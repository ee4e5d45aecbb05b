"""A dense branch acts by its weight, on the tokens that lean on it only."""

import pytest
import torch
from torch import nn

from mixwright.experts.dense_branch import DenseBranch, DenseNeurons
from mixwright.experts.neuron import NeuronExperts
from mixwright.experts.table import NeuronTable, initial_rows
from mixwright.routing import Condition, Routing

N, D = 12, 6


def neurons(parts: int = 2) -> NeuronExperts:
    return NeuronExperts(NeuronTable(initial_rows(N, parts, D, 0.5, torch.Generator().manual_seed(0))))


def routing(share: torch.Tensor) -> Routing:
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(*share.shape, 4, generator=generator)
    indices = torch.randint(N, weights.shape, generator=generator)
    last = torch.full((*share.shape, 1), N)
    return Routing(torch.cat([weights, share[..., None]], -1), N + 1, torch.cat([indices, last], -1))


def test_the_branch_is_one_expert_more() -> None:
    share = torch.tensor([[0.0, 0.3, 0.0], [1.0, 0.0, 0.2]])
    x, dense = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(2)), nn.Linear(D, D)
    both = DenseBranch(neurons(), dense)
    whole = routing(share)
    alone = neurons()(x, Routing(whole.weights[..., :-1], N, whole.indices[..., :-1]), Condition())
    found = both(x, whole, Condition())
    torch.testing.assert_close(found, alone + share[..., None] * dense(x))
    assert torch.equal(found[share == 0], alone[share == 0])


def test_only_the_tokens_that_lean_reach_it() -> None:
    seen: list[int] = []
    dense = nn.Linear(D, D)
    dense.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    both = DenseBranch(neurons(), dense)
    both(torch.randn(5, D), routing(torch.tensor([0.0, 0.1, 0.0, 0.0, 0.4])), Condition())
    both(torch.randn(2, D), routing(torch.zeros(2)), Condition())
    assert seen == [2]


@pytest.mark.parametrize("parts", [2, 3])
def test_dense_neurons_are_all_neurons_of_a_table_at_weight_one(parts: int) -> None:
    rows = initial_rows(N, parts, D, 0.5, torch.Generator().manual_seed(3))
    x = torch.randn(4, 7, D, generator=torch.Generator().manual_seed(4))
    every = Routing(torch.ones(4, 7, N), N, torch.arange(N).expand(4, 7, N))
    wanted = NeuronExperts(NeuronTable(rows), "silu")(x, every, Condition())
    torch.testing.assert_close(DenseNeurons(rows.clone(), "silu")(x), wanted)


def test_a_routing_without_a_branch_is_refused() -> None:
    both = DenseBranch(neurons(), nn.Linear(D, D))
    with pytest.raises(ValueError, match="LeaningRouter"):
        both(torch.randn(2, D), Routing(torch.ones(2, 3), N, torch.zeros(2, 3, dtype=torch.int64)), Condition())
