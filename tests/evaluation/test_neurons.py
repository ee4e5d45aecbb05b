"""A layer's output taken apart: every part is there, and together they are the output."""

from typing import Any

import pytest
import torch
from torch import nn

from mixwright.evaluation.neurons import neuron_parts, trace_neurons
from mixwright.experts.dense_branch import DenseBranch, DenseNeurons
from mixwright.experts.neuron import NeuronExperts
from mixwright.experts.table import NeuronTable, initial_rows
from mixwright.routers.adaptive import AdaptiveRouter
from mixwright.routers.unsure import LeaningRouter, WideningRouter
from mixwright.routing import Condition

from .neuron_layer import NeuronLayer, neuron_layer, tokens

D = 8


def narrow(layer: NeuronLayer, parts: int) -> None:
    """Rows of width 4 between projections, with biases of the table, of the projection and of the output."""
    table = NeuronTable(initial_rows(20, parts, 4, 0.5), torch.randn(20, parts - 1))
    bias = torch.randn(D)
    layer.experts = NeuronExperts(table, "silu", nn.Linear(D, 4), nn.Linear(4, D), bias)


def leaning(layer: NeuronLayer, _: int) -> None:
    layer.experts = DenseBranch(layer.experts, DenseNeurons(initial_rows(6, 2, D, 0.5)))
    layer.router = LeaningRouter(layer.router, torch.full((2,), 0.4))  # type: ignore[arg-type]


def widened(layer: NeuronLayer, _: int) -> None:
    layer.router = WideningRouter(layer.router, torch.full((2,), 0.4), 7)  # type: ignore[arg-type]


def adaptive(layer: NeuronLayer, _: int) -> None:
    layer.router = AdaptiveRouter(layer.router, 0.5, 9)  # type: ignore[arg-type]


def plain(layer: NeuronLayer, _: int) -> None: ...


@torch.no_grad()
@pytest.mark.parametrize("change", [plain, narrow, leaning, widened, adaptive])
@pytest.mark.parametrize("parts", [2, 3])
def test_parts_sum_to_the_output(change: Any, parts: int) -> None:
    layer = neuron_layer(parts=parts)
    change(layer, parts)
    layer.eval()
    x = tokens(3, 11)
    found = trace_neurons(layer.router, layer.experts, x)
    y = layer(x).flatten(0, 1)
    whole = found.rest.clone()
    experts: Any = layer.experts
    neurons = experts.experts if isinstance(experts, DenseBranch) else experts
    hidden, parts_of = neuron_parts(neurons, x.flatten(0, 1), found.gates, found.ids)
    whole += parts_of.sum(1)
    if isinstance(experts, DenseBranch):
        assert found.dense is not None and found.dense_norm is not None and (found.dense > 0).any()
        added = experts.dense(x.flatten(0, 1)) * found.dense[:, None]
        torch.testing.assert_close(found.dense_norm, added.norm(dim=-1))
        whole += added
    for sum_of_parts in (whole, found.outputs):
        assert float((sum_of_parts - y).norm() / y.norm()) < 1e-6
    torch.testing.assert_close(found.norms, parts_of.norm(dim=-1))
    torch.testing.assert_close(found.activations, hidden)
    assert found.rest.any() == (change is narrow)


def test_a_table_that_two_layers_share() -> None:
    first, second = neuron_layer(), neuron_layer(seed=3)
    second.experts.table = first.experts.table  # type: ignore[union-attr]
    for layer in (first, second):
        found = trace_neurons(layer.router, layer.experts, tokens(5))
        with torch.no_grad():
            assert float((found.outputs - layer(tokens(5))).norm()) < 1e-6


def test_a_memory_of_values() -> None:
    layer = neuron_layer(parts=1)
    found = trace_neurons(layer.router, layer.experts, tokens(5))
    assert (found.activations == 1).all()
    with torch.no_grad():
        torch.testing.assert_close(found.outputs, layer(tokens(5)))


def test_a_token_lists_who_acted_largest_first() -> None:
    layer, x = neuron_layer(), tokens(2, 4)
    found = trace_neurons(layer.router, layer.experts, x)
    retrieved = layer.router.retrieve(x, Condition(), detail=True)
    listed = found.token(5)
    assert len(listed) == 6
    assert [n.norm for n in listed] == sorted((n.norm for n in listed), reverse=True)
    assert {(n.head, n.id) for n in listed} == {
        (head, int(i)) for head in range(2) for i in retrieved.indices[1, 1, head]
    }
    assert all(n.id == n.place[0] * 4 + n.place[1] for n in listed)
    assert sum(n.gate for n in listed) == pytest.approx(2.0)
    assert found.token(5, most=2) == listed[:2]
    assert retrieved.coverage is not None and found.coverage is not None and retrieved.margin is not None
    torch.testing.assert_close(found.coverage, retrieved.coverage.flatten(0, 1))
    assert found.margin is not None and found.flagged is None and found.dense is None
    torch.testing.assert_close(found.margin, retrieved.margin.flatten(0, 1))


def test_flags_and_padding_show() -> None:
    layer, x = neuron_layer(), tokens(2, 4)
    widened(layer, 2)
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[1, 2:] = False
    found = trace_neurons(layer.router, layer.experts, x, Condition(token_mask=mask))
    assert found.flagged is not None and found.flagged.any() and not found.flagged[6:].any()
    assert found.token(7) == [] and not found.norms[6:].any()
    acting = (found.gates != 0).unflatten(-1, (2, 7)).sum(-1)[:6]
    assert torch.equal(acting, torch.where(found.flagged[:6], 7, 3))


def test_no_tokens_at_all() -> None:
    layer = neuron_layer()
    assert trace_neurons(layer.router, layer.experts, tokens(0)).outputs.shape == (0, D)
