"""What every kind of experts that combine factors promises; a new kind adds one line to a table."""

import pytest
import torch

from mixwright.experts.poly import PolyExperts
from mixwright.experts.tensor import OrderedTensorExperts, TensorExperts
from mixwright.ops.tensor_product import ceil_radices, exact_radices
from mixwright.routing import Condition, Routing

E, RANK, D_IN, D_OUT = 4, 3, 24, 18


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaves(width, order, *leading, radices=ceil_radices):
    return [random(10 * width + n, *leading, RANK, q) for n, q in enumerate(radices(width, order))]


def poly(heads=1):
    return PolyExperts(random(1, E, RANK, D_IN), random(2, E, RANK, D_OUT), heads)


def tensor(order, norm=False, radices=ceil_radices):
    made = (leaves(width, order, E, radices=radices) for width in (D_IN, D_OUT))
    return TensorExperts(*made, D_IN, D_OUT, norm)


def ordered(order, groups=1, norm=False):
    return OrderedTensorExperts(*(leaves(width, order, E, groups) for width in (D_IN, D_OUT)), D_IN, D_OUT, norm)


KINDS = {
    "poly": poly,
    "mhr": lambda: poly(heads=3),
    "tensor-1": lambda: tensor(1),
    "tensor-2": lambda: tensor(2),
    "tensor-2-norm": lambda: tensor(2, norm=True),
    "tensor-3": lambda: tensor(3, radices=exact_radices),
    "tensor-4-norm": lambda: tensor(4, norm=True),
    "ordered-2": lambda: ordered(2),
    "ordered-4": lambda: ordered(4),
    "entangled-2-norm": lambda: ordered(2, groups=2, norm=True),
    "entangled-3": lambda: ordered(3, groups=2),
}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def one_by_one(experts, x, weights):
    """(1/rank) (x A_w) B_w with factors of its own for every token; weights (*leading, [positions,] experts)."""
    leading = x.shape[:-1]
    down, up = experts.factors(weights.expand(*leading, *weights.shape[len(leading) :]).flatten(0, len(leading) - 1))
    out = torch.einsum("ti,tri,tro->to", x.flatten(0, -2), down, up) / experts.rank
    return out.view(*leading, experts.d_out)


@every_kind
@pytest.mark.parametrize("leading", [(5,), (5, 7), (5, 7, 2), (1, 1), (0,), (0, 7), (5, 0)], ids=str)
def test_every_form_of_routing_equals_factors_token_by_token(make, leading):
    experts, x, ones = make(), random(3, *leading, D_IN), [1] * (len(leading) - 1)
    positions = [] if experts.positions is None else [experts.positions]
    condition = Condition(task_ids=torch.arange(leading[0]) % 3)
    for shape in (
        (E,),
        (leading[0], *ones, E),
        (1, *ones, *positions, E),
        (leading[0], *ones, *positions, E),
        (*leading, E),
        (*leading, *positions, E),
    ):
        routing = Routing(random(4, *shape).sigmoid(), E)
        out = experts(x, routing, condition)
        assert out.shape == (*leading, D_OUT)
        if out.numel():
            expected = one_by_one(experts, x, experts.weights(routing, x.dim()))
            torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-10)
