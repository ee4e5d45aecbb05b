"""Single-neuron experts: the contract of experts, what stands around rows, frozen and appended rows, first values."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixwright.experts.neuron import NeuronExperts, OutputGate
from mixwright.experts.table import NeuronTable, initial_rows, out_std_for
from mixwright.ops.neuron import neurons_reference
from mixwright.routing import Condition, Routing

N, D, W, K = 11, 6, 4, 5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def experts(parts: int = 2, *, narrow: bool = False, bias: bool = False, **options: Any) -> NeuronExperts:
    torch.manual_seed(0)
    width = W if narrow else D
    table = NeuronTable(normal(N, parts, width), normal(N, parts - 1, seed=1) if bias else None)
    ways = (nn.Linear(D, W, bias=False), nn.Linear(W, D, bias=False)) if narrow else (None, None)
    return NeuronExperts(table, "silu", *ways, **options).double()


def routing(*batch: int, seed: int = 2) -> Routing:
    draw = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, N, (*batch, K), generator=draw)
    return Routing(torch.rand(*batch, K, generator=draw, dtype=torch.float64), N, indices)


KINDS: dict[str, dict[str, Any]] = {
    "values": {"parts": 1},
    "neurons": {},
    "neurons-biased": {"bias": True, "out_bias": normal(D, seed=7)},
    "gated": {"parts": 3, "bias": True},
    "narrow": {"narrow": True, "parts": 3},
    "memory-plus": {"parts": 1, "output_gate": OutputGate(D, D, D)},
}
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


@every_kind
def test_the_sum_is_the_references_between_what_stands_around_it(options: dict[str, Any]) -> None:
    made, x, route = experts(**options), normal(2, 3, D, seed=3), routing(2, 3)
    inside = made.inward(x).reshape(6, -1)
    assert route.indices is not None
    weights, indices = route.weights.view(6, K), route.indices.view(6, K)
    found = neurons_reference(inside, made.table.rows, weights, indices, "silu", made.table.bias)  # type: ignore[union-attr]
    torch.testing.assert_close(made(x, route, Condition()), made.outward(x, found.view(2, 3, -1)))


@every_kind
def test_the_contract_of_experts(options: dict[str, Any]) -> None:
    made, x, route = experts(**options), normal(2, 3, D, seed=3), routing(2, 3)
    out = made(x, route, Condition())
    assert out.shape == x.shape and made.num_experts == N
    order = torch.randperm(K)
    assert route.indices is not None
    swapped = Routing(route.weights[..., order], N, route.indices[..., order])
    torch.testing.assert_close(made(x, swapped, Condition()), out)
    nobody = Routing(torch.zeros_like(route.weights), N, route.indices)
    torch.testing.assert_close(made(x, nobody, Condition()), made.outward(x, torch.zeros_like(made.inward(x))))
    permuted = torch.randperm(N)
    with torch.no_grad():
        for tensor in (made.table.rows, made.table.bias):  # type: ignore[union-attr]
            if tensor is not None:
                tensor.copy_(tensor[permuted].clone())
    renamed = Routing(route.weights, N, permuted.argsort()[route.indices])
    torch.testing.assert_close(made(x, renamed, Condition()), out)
    base = normal(2, 3, D, seed=8)
    torch.testing.assert_close(made.onto(base.clone(), x, renamed, Condition()), base + out)


def test_one_routing_for_all_tokens_broadcasts() -> None:
    made, x, route = experts(), normal(2, 3, D, seed=3), routing(2, 1)
    torch.testing.assert_close(made(x, route, Condition())[:, [1]], made(x[:, [1]], route, Condition()))


def test_experts_that_are_not_named_are_refused() -> None:
    with pytest.raises(ValueError, match="neurons need a routing that names them; this one weighs all 11"):
        experts()(normal(1, D), Routing(torch.ones(1, N), N), Condition())
    with pytest.raises(ValueError, match="x has width 5 where it meets rows of width 6"):
        experts()(normal(2, 5), routing(2), Condition())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: NeuronTable(torch.zeros(3, 4, 2)), "rows has 4 parts"),
        (
            lambda: NeuronTable(torch.zeros(3, 2, 2), torch.zeros(3, 2)),
            r"bias has shape \(3, 2\).*take one of \(3, 1\)",
        ),
        (lambda: experts(dropout=1.5), "dropout=1.5"),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("gradient", ["dense", "compact"])
def test_frozen_rows_get_no_gradient(gradient: str) -> None:
    made, x, route = experts(bias=True), normal(3, D, seed=3), routing(3)
    table = made.table
    assert isinstance(table, NeuronTable)
    table.gradient = gradient  # type: ignore[assignment]
    made(x, route, Condition()).square().sum().backward()
    free = [table.rows.grad.to_dense().clone(), table.bias.grad.to_dense().clone()]  # type: ignore[union-attr]
    for parameter in (table.rows, table.bias):
        parameter.grad = None  # type: ignore[union-attr]
    assert route.indices is not None
    table.frozen = torch.arange(N) % 2 == 0
    given = x.clone().requires_grad_()
    out = made(given, route, Condition())
    assert torch.equal(out.detach(), experts(bias=True)(x, route, Condition()).detach())
    out.square().sum().backward()
    for before, parameter in zip(free, (table.rows, table.bias), strict=True):
        assert parameter is not None and parameter.grad is not None
        if parameter.grad.is_sparse:
            assert not table.frozen[parameter.grad.coalesce().indices()[0]].any()
        after = parameter.grad.to_dense()
        assert after[table.frozen].eq(0).all()
        torch.testing.assert_close(after[~table.frozen], before[~table.frozen])
    assert given.grad is not None and given.grad.abs().sum() > 0


def test_appended_rows_leave_ids_and_parameters() -> None:
    made, x, route = experts(bias=True), normal(3, D, seed=3), routing(3)
    table = made.table
    assert isinstance(table, NeuronTable)
    before, rows, bias = made(x, route, Condition()), table.rows, table.bias
    table.append(normal(4, 2, D, seed=9))
    assert table.rows is rows and table.bias is bias
    assert (made.num_experts, table.rows.shape, table.bias.shape) == (15, (15, 2, D), (15, 1))  # type: ignore[union-attr]
    torch.testing.assert_close(made(x, route, Condition()), before)
    fresh = experts(bias=True)
    fresh.load_state_dict(made.state_dict())
    assert torch.equal(fresh.table.rows, table.rows)  # type: ignore[union-attr]


def test_a_shorter_reach_is_a_shorter_table_to_the_bit() -> None:
    x, route = normal(9, D, seed=3), routing(9)
    short, long = experts().table, experts().table
    assert isinstance(short, NeuronTable) and isinstance(long, NeuronTable) and route.indices is not None
    long.append(normal(40, 2, D, seed=9))
    arguments = (x, route.weights, route.indices, "silu")
    for table, options in ((short, {}), (long, {"reach": N})):
        table(*arguments, **options).square().sum().backward()  # type: ignore[arg-type]
    assert torch.equal(long(*arguments, reach=N), short(*arguments))
    assert torch.equal(long.rows.grad[:N], short.rows.grad)  # type: ignore[index]
    assert long.rows.grad[N:].eq(0).all()  # type: ignore[index]


def test_first_rows_have_the_sizes_that_they_say() -> None:
    rows = initial_rows(4000, 3, 50, 0.3, torch.Generator().manual_seed(0))
    for part, size in ((0, 50**-0.5), (1, 50**-0.5), (2, 0.3)):
        assert float(rows[:, part].std()) == pytest.approx(size, rel=0.02)
    assert torch.equal(rows, initial_rows(4000, 3, 50, 0.3, torch.Generator().manual_seed(0)))
    # one softmax over k: Var y = h / k E[gelu^2] sigma^2
    assert out_std_for(0.5, 8, 16, "softmax", "gelu", 1024**2) == pytest.approx(0.5 / (8 / 16 * 0.425) ** 0.5)
    assert out_std_for(0.5, 8, 16, "one", None, 1024**2) == pytest.approx(0.5 / 128**0.5)
