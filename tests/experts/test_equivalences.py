"""The kinds of factored experts are one family: each is another one at the edge of its settings."""

import itertools
import math

import pytest
import torch
from torch import nn

from mixwright.composition.mixture import Mixture
from mixwright.experts.lora import LoraExperts
from mixwright.experts.poly import PolyExperts
from mixwright.experts.tensor import OrderedTensorExperts, TensorExperts
from mixwright.ops.tensor_product import ceil_radices, exact_radices, materialise
from mixwright.routers.constant import ConstantRouter
from mixwright.routers.gate import PrototypeScores
from mixwright.routers.task import TaskLogits, TaskRouter
from mixwright.routers.token import TokenRouter
from mixwright.routing import Condition, Routing

E, RANK, D_IN, D_OUT = 4, 3, 24, 18


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaves(order, *leading, radices=ceil_radices):
    return [
        [random(10 * side + n, *leading, RANK, q) for n, q in enumerate(radices(width, order))]
        for side, width in enumerate((D_IN, D_OUT))
    ]


def rank_routed(down, up, norm=False):
    return TensorExperts(down, up, D_IN, D_OUT, norm)


def order_routed(down, up, norm=False):
    """The same leaves with one group."""
    grouped = [[leaf.unsqueeze(1) if leaf.dim() == 3 else leaf for leaf in side] for side in (down, up)]
    return OrderedTensorExperts(*grouped, D_IN, D_OUT, norm)


def run(experts, weights, x=None):
    return experts(random(3, 2, 5, experts.d_in) if x is None else x, Routing(weights, E), Condition())


def weights(*shape):
    made = random(4, *shape).sigmoid()
    return made / made.sum(-1, keepdim=True)


def test_order_one_is_poly_whoever_routes():
    (down,), (up,) = leaves(1, E)
    w = weights(2, 1, E)
    expected = run(PolyExperts(down, up), w)
    torch.testing.assert_close(run(rank_routed([down], [up]), w), expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(run(order_routed([down], [up]), w), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_one_term_is_tlora_and_its_router_learns_nothing(order):
    down, up = leaves(order, 1)
    experts, x = TensorExperts(down, up, D_IN, D_OUT), random(3, 2, 5, D_IN)
    router = TaskLogits(random(5, 3, 1))
    condition = Condition(task_ids=torch.tensor([2, 0]))
    routed = experts(x, router(x, condition), condition)
    plain = experts(x, Routing(torch.ones(1).double(), 1), Condition())
    torch.testing.assert_close(routed, plain, atol=1e-9, rtol=1e-9)
    routed.sum().backward()
    assert router.logits.grad is not None and router.logits.grad.abs().max() < 1e-8


def test_tlora_is_the_sum_of_its_terms():
    down, up = leaves(2, E)
    a, b = materialise(down, D_IN).sum(0), materialise(up, D_OUT).sum(0)
    x = random(3, 2, 5, D_IN)
    found = run(rank_routed(down, up), torch.ones(E).double(), x)
    torch.testing.assert_close(found, x @ a.T @ b / RANK, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("norm", [False, True])
def test_one_hot_routing_is_the_same_by_rank_and_by_order(order, norm):
    down, up = leaves(order, E)
    w = torch.eye(E).double()[2]
    by_rank, by_order = rank_routed(down, up, norm), order_routed(down, up, norm)
    here, there = run(by_rank, w), run(by_order, w.expand(1, 1, order, E))
    if norm:
        torch.testing.assert_close(here, there, atol=1e-12, rtol=1e-12)
    else:
        assert torch.equal(here, there)


@pytest.mark.parametrize("order", [2, 3])
def test_order_routing_is_poly_over_all_combinations_of_leaves(order):
    down, up = leaves(order, E)
    w = weights(1, 1, order, E)
    choices = list(itertools.product(range(E), repeat=order))
    stored = [
        torch.cat([materialise([leaf[s, None] for leaf, s in zip(side, choice)], width) for choice in choices])
        for side, width in ((down, D_IN), (up, D_OUT))
    ]
    strengths = torch.tensor([math.prod(w[0, 0, n, s] for n, s in enumerate(choice)) for choice in choices])
    x = random(3, 2, 5, D_IN)
    expected = PolyExperts(*stored)(x, Routing(strengths.double(), len(choices)), Condition())
    torch.testing.assert_close(run(order_routed(down, up), w, x), expected, atol=1e-12, rtol=1e-11)


def test_several_groups_are_a_sum_of_factors_and_hold_what_rank_routing_can_say():
    """Group g of ours has the leaves of term g alone: choosing it by the first order position is TensorPoly-I."""
    down, up = leaves(2, E)
    w = weights(1, 1, E)
    lifted = []
    for side in (down, up):
        first = torch.zeros(E, E, *side[0].shape[1:]).double()
        first[range(E), range(E)] = side[0]
        lifted.append([first, side[1].unsqueeze(0).expand(E, E, -1, -1).clone()])
    uniform = torch.full_like(w, 1 / E)
    found = run(OrderedTensorExperts(*lifted, D_IN, D_OUT), torch.stack([w, uniform], -2))
    torch.testing.assert_close(found, run(rank_routed(down, up), w), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("order", [2, 4])
def test_a_column_has_rank_one_by_order_and_up_to_terms_or_groups_otherwise(order):
    """Of its unfolding between the two halves of the leaves; without a cut."""
    radices = exact_radices(D_IN, order)
    middle = math.prod(radices[order // 2 :])

    def rank(experts, w):
        column = experts.factors(w)[0][0, 0]
        return int(torch.linalg.matrix_rank(column.view(-1, middle)))

    sides, w = leaves(order, E, radices=exact_radices), weights(1, order, E)
    assert rank(order_routed(*sides), w) == 1
    most = min(D_IN // middle, middle)
    assert rank(rank_routed(*sides), w[:, 0]) == min(E, most)
    assert rank(OrderedTensorExperts(*leaves(order, E, 2, radices=exact_radices), D_IN, D_OUT), w) == min(2, most)


def test_the_update_has_at_most_the_rank_of_a_lora():
    for experts in (rank_routed(*leaves(2, E)), order_routed(*leaves(3, E))):
        down, up = experts.factors(weights(1, E) if experts.positions is None else weights(1, 3, E))
        assert torch.linalg.matrix_rank(up[0].T @ down[0]) == RANK


def test_heads_that_choose_alike_are_poly():
    down, up = random(1, E, RANK, D_IN), random(2, E, RANK, D_OUT)
    w = weights(2, 1, E)
    expected = run(PolyExperts(down, up), w)
    alike = w.unsqueeze(-2).expand(2, 1, 6, E)
    torch.testing.assert_close(run(PolyExperts(down, up, heads=6), alike), expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(run(PolyExperts(down, up, heads=1), w.unsqueeze(-2)), expected, atol=0, rtol=0)
    apart = run(PolyExperts(down, up, heads=6), weights(2, 1, 6, E))
    assert not torch.allclose(apart, expected)


def test_poly_with_one_expert_is_lora_of_alpha_one():
    down, up, x = random(1, 1, RANK, D_IN), random(2, 1, RANK, D_OUT), random(3, 2, 5, D_IN)
    routing = Routing(torch.ones(1).double(), 1)
    lora = LoraExperts(down, up.transpose(1, 2).contiguous(), torch.tensor([1 / RANK]), 1)
    lora.scale = lora.scale.double() * 0 + 1 / RANK
    torch.testing.assert_close(
        PolyExperts(down, up)(x, routing, Condition()), lora(x, routing, Condition()), atol=1e-12, rtol=1e-12
    )


def test_equal_logits_are_the_mean_of_the_experts():
    experts, x = rank_routed(*leaves(2, E)), random(3, 2, 5, D_IN)
    condition = Condition(task_ids=torch.tensor([0, 1]))
    learned = experts(x, TaskLogits(torch.full((2, E), 0.7).double())(x, condition), condition)
    mean = experts(x, ConstantRouter(torch.full((E,), 1 / E))(x, condition), condition)
    torch.testing.assert_close(learned, mean, atol=1e-8, rtol=1e-7)


@pytest.mark.parametrize("heads", [1, 6])
def test_pefts_poly_layer_gives_the_same_output(heads):
    peft = pytest.importorskip("peft")
    from peft.tuners.poly.layer import Linear

    base = nn.Linear(D_IN, D_OUT)
    config = peft.PolyConfig(r=RANK, n_tasks=3, n_skills=E, n_splits=heads, init_weights=False)
    theirs = Linear(base, "poly", config).eval()
    down = theirs.poly_lora_A["poly"].detach().permute(1, 3, 0, 2).reshape(E, RANK, D_IN)
    up = theirs.poly_lora_B["poly"].detach().permute(1, 2, 0, 3).reshape(E, RANK, D_OUT)
    logits = random(6, 3, heads * E).float()
    with torch.no_grad():
        theirs.poly_router["poly"].module_logits.copy_(logits)
    router = TaskLogits(logits if heads == 1 else logits.view(3, heads, E))
    ours = Mixture(base, router, PolyExperts(down.clone(), up.clone(), heads)).eval()
    ids, x = torch.tensor([2, 0, 2]), random(3, 3, 5, D_IN).float()
    ours.channel.condition = Condition(task_ids=ids)
    torch.testing.assert_close(ours(x), theirs(x, task_ids=ids), atol=1e-5, rtol=1e-5)


ROUTERS = {
    "token": lambda positions: TokenRouter(PrototypeScores(random(7, E, D_IN).float()), 2),
    "constant": lambda positions: ConstantRouter(torch.full((E,), 1 / E)),
    "table": lambda positions: TaskRouter(weights(3, E).float()),
    "logits": lambda positions: TaskLogits(random(8, 3, *positions, E).float()),
}
KINDS = {
    "lora": lambda: PolyExperts(random(1, E, RANK, D_IN), random(2, E, RANK, D_OUT)),
    "mhr": lambda: PolyExperts(random(1, E, RANK, D_IN), random(2, E, RANK, D_OUT), heads=3),
    "tensor": lambda: rank_routed(*leaves(4, E), norm=True),
    "ordered": lambda: OrderedTensorExperts(*leaves(2, E, 2), D_IN, D_OUT),
}


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_router_with_every_kind(router, kind):
    """Rows of a batch are the rows alone, trained and evaluated, in the middle of a mixture."""
    experts = kind().float()
    positions = [] if experts.positions is None else [experts.positions]
    mixture = Mixture(nn.Linear(D_IN, D_OUT), router(positions), experts)
    x, ids = random(3, 3, 5, D_IN).float(), torch.tensor([1, 0, 1])
    mixture.channel.condition = Condition(task_ids=ids)
    trained = mixture(x)
    trained.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in experts.parameters())
    with torch.inference_mode():
        evaluated = [mixture.eval()(x) for _ in range(2)]
        alone = []
        for row, task in enumerate(ids):
            mixture.channel.condition = Condition(task_ids=task[None])
            alone.append(mixture(x[row : row + 1]))
    for found in (*evaluated, torch.cat(alone)):
        torch.testing.assert_close(found, trained.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_one_expert_alone_by_an_override(kind):
    """What `only` puts in place of a router: one weight with its id and no other axis."""
    experts, x = kind(), random(3, 2, 5, D_IN)
    chosen = Routing(torch.ones(1).double(), E, torch.tensor([2]))
    expected = run(experts, torch.eye(E).double()[2], x)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(experts.eval()(x, chosen, Condition()), expected, atol=1e-12, rtol=1e-12)
