"""What every kind of experts that combine factors promises; a new kind adds one line to a table."""

import copy
import pickle
import re

import pytest
import torch

from mixwright.experts.factor_cache import MOST
from mixwright.experts.poly import PolyExperts
from mixwright.experts.tensor import OrderedTensorExperts, TensorExperts
from mixwright.ops.tensor_product import ceil_radices, exact_radices, materialise
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


def table(experts, tasks=3, seed=5):
    positions = [] if experts.positions is None else [experts.positions]
    return random(seed, tasks, 1, *positions, E).sigmoid()


def by_task(weights, *ids):
    return Routing(weights[list(ids)], E), Condition(task_ids=torch.tensor(ids))


@every_kind
def test_sparse_routing_equals_dense(make):
    experts, x = make(), random(3, 2, 6, D_IN)
    values, indices = random(4, 2, 6, E).topk(2, -1)
    sparse = Routing(values.softmax(-1), E, indices)
    dense = experts(x, Routing(sparse.dense(), E), Condition())
    torch.testing.assert_close(experts(x, sparse, Condition()), dense)
    one = Routing(torch.ones(1).double(), E, torch.tensor([2]))
    torch.testing.assert_close(
        experts(x, one, Condition()), experts(x, Routing(torch.eye(E)[2].double(), E), Condition())
    )


@every_kind
def test_zero_weights_give_zero(make):
    experts = make()
    for shape in ((E,), (2, 1, E), (2, 6, E)):
        out = experts(random(3, 2, 6, D_IN), Routing(torch.zeros(shape).double(), E), Condition())
        assert out.eq(0).all()


@every_kind
def test_permuting_experts_and_weights_together_changes_nothing(make):
    experts, x, order = make(), random(3, 2, 6, D_IN), [2, 0, 3, 1]
    weights = table(experts, tasks=2)
    expected = experts(x, Routing(weights, E), Condition())
    with torch.no_grad():
        for leaf in experts.parameters():
            leaf.copy_(leaf[order].clone())
    torch.testing.assert_close(experts(x, Routing(weights[..., order], E), Condition()), expected)


@every_kind
@pytest.mark.parametrize("gradients", [False, True])
def test_onto_is_the_base_plus_the_experts(make, gradients):
    experts, x, base = make().requires_grad_(gradients), random(3, 3, 4, D_IN), random(7, 3, 4, D_OUT)
    for routing in (Routing(table(experts)[:1], E), Routing(table(experts), E), Routing(random(4, 3, 4, E), E)):
        with torch.set_grad_enabled(gradients):
            expected = base + experts(x, routing, Condition())
            torch.testing.assert_close(experts.onto(base.clone(), x, routing, Condition()), expected)
            strided = base.transpose(0, 1).contiguous().transpose(0, 1)
            torch.testing.assert_close(experts.onto(strided, x, routing, Condition()), expected)
            half = experts.onto(base.bfloat16(), x, routing, Condition())
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.double(), expected, atol=1.0, rtol=0.02)


@every_kind
@pytest.mark.parametrize("ids", [(0,) * 4, (0, 0, 1, 1), (0, 1, 0, 2), (2, 1, 0, 2), (0, 1, 2, 3)], ids=str)
def test_a_mixed_batch_is_its_tasks_one_by_one(make, ids):
    """Values, and gradients of leaves, logits and input; one id for all rows, too."""
    experts, x = make().train(), random(3, 4, 5, D_IN).requires_grad_()
    logits = table(experts, tasks=4).requires_grad_()
    inputs = [*experts.parameters(), logits, x]
    routing, condition = by_task(logits, *ids)
    mixed = experts(x, routing, condition)
    alone = torch.cat([experts(x[i : i + 1], *by_task(logits, task)) for i, task in enumerate(ids)])
    torch.testing.assert_close(mixed, alone, atol=1e-11, rtol=1e-11)
    seed = random(8, *mixed.shape)
    for mine, theirs in zip(
        torch.autograd.grad(mixed, inputs, seed), torch.autograd.grad(alone, inputs, seed), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-10)


@every_kind
def test_rows_of_one_task_with_weights_of_their_own_stay_their_own(make):
    experts, x, condition = make(), random(3, 4, 5, D_IN), Condition(task_ids=torch.tensor([0, 0, 1, 1]))
    weights = table(experts, tasks=4)
    torch.testing.assert_close(experts(x, Routing(weights, E), condition), experts(x, Routing(weights, E), Condition()))


@every_kind
def test_each_distinct_choice_is_built_once(make, monkeypatch):
    experts, x, built = make(), random(3, 6, 5, D_IN), []
    factors = type(experts).factors
    monkeypatch.setattr(type(experts), "factors", lambda self, w: built.append(len(w)) or factors(self, w))
    experts.train()(x, *by_task(table(experts), 0, 1, 0, 1, 1, 0))
    experts.train()(x, *by_task(table(experts), 1, 1, 1, 1, 1, 1))
    experts.train()(x, *by_task(table(experts), 2))
    assert built == [2, 1, 1]
    experts.eval()
    with torch.no_grad():
        for ids in ((0,), (1,), (0, 1, 1, 0, 2, 2), (0,), (1,), (0, 1, 1, 0, 2, 2), (0,)):
            experts(x, *by_task(table(experts), *ids))
    assert built[3:] == [1, 1, 3], "two tasks in turn, and a mixed batch, are kept"


CHANGES = {
    "optimizer step": lambda experts, x: step(experts, x),
    "load_state_dict": lambda experts, x: experts.load_state_dict(moved(experts)),
    "load_state_dict, assigned": lambda experts, x: experts.load_state_dict(moved(experts), assign=True),
    "copy_ under no_grad": lambda experts, x: write(experts),
    "requires_grad_(False) and a write": lambda experts, x: write(experts.requires_grad_(False)),
    "a new parameter": lambda experts, x: replace_last(experts),
    "written in inference mode": lambda experts, x: write(experts, torch.inference_mode),
    ".data, then train() and eval()": lambda experts, x: [p.data.mul_(2) for p in experts.train().parameters()],
    ".data, then forget()": lambda experts, x: [p.data.mul_(2) for p in experts.parameters()] + [experts.forget()],
}


def step(experts, x):
    optimizer = torch.optim.SGD(experts.parameters(), lr=0.1)
    experts(x, Routing(torch.ones(E).double(), E), Condition()).sum().backward()
    optimizer.step()


def moved(experts):
    return {name: value + 0.5 for name, value in experts.state_dict().items()}


def write(experts, mode=torch.no_grad):
    with mode():
        next(experts.parameters()).copy_(next(experts.parameters()) + 0.5)


def replace_last(experts):
    home = experts.up if isinstance(experts.up, torch.nn.ParameterList) else experts
    name = list(home._parameters)[-1]
    setattr(home, name, torch.nn.Parameter(home._parameters[name] + 0.5))


@every_kind
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("same_routing", [True, False])
def test_kept_factors_follow_every_change(make, change, same_routing):
    experts, x = make().eval(), random(3, 1, 5, D_IN)
    routing, condition = by_task(table(experts), 0)
    with torch.no_grad():
        before = experts(x, routing, condition)
        assert torch.equal(experts(x, routing, condition), before)
    change(experts, x)
    experts.eval()
    if not same_routing:
        routing, condition = by_task(table(experts), 0)
    with torch.no_grad():
        after = experts(x, routing, condition)
        expected = one_by_one(experts, x, experts.weights(routing, 3))
    torch.testing.assert_close(after, expected, atol=1e-11, rtol=1e-11)
    assert not torch.allclose(after, before)


@every_kind
def test_kept_factors_follow_the_routing(make):
    experts, x, weights = make().eval(), random(3, 1, 5, D_IN), table(make())
    routing, condition = by_task(weights, 0)
    with torch.no_grad():
        before = experts(x, routing, condition)
        routing.weights.mul_(2)
        written = experts(x, routing, condition)
        assert not torch.allclose(written, before)
        torch.testing.assert_close(written, one_by_one(experts, x, experts.weights(routing, 3)))
        other = Routing(routing.weights * 2, E)
        torch.testing.assert_close(experts(x, other, condition), one_by_one(experts, x, experts.weights(other, 3)))


@every_kind
def test_the_same_routing_again_is_answered_without_looking_for_its_choices(make, monkeypatch):
    experts, x, condition = make().eval(), random(3, 1, 2, D_IN), Condition(task_ids=torch.tensor([1]))
    routing = Routing(random(5, 1, 1, E).sigmoid(), E)
    with torch.no_grad():
        first = experts(x, routing, condition)
        monkeypatch.setattr(experts, "_by_row", None)
        assert torch.equal(experts(x, routing, condition), first)
        with pytest.raises(TypeError):
            experts(x, Routing(routing.weights, E), condition)


@every_kind
def test_kept_factors_live_in_no_state_copy_or_pickle_and_are_bounded(make):
    experts, x = make().eval(), random(3, 1, 5, D_IN)
    names, size = list(experts.state_dict()), len(pickle.dumps(experts))
    with torch.no_grad():
        before = experts(x, *by_task(table(experts), 0))
        assert list(experts.state_dict()) == names and len(pickle.dumps(experts)) == size
        for twin in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
            write(twin)
            routing, condition = by_task(table(experts), 0)
            expected = one_by_one(twin, x, twin.weights(routing, 3))
            torch.testing.assert_close(twin(x, routing, condition), expected)
        assert torch.equal(experts(x, *by_task(table(experts), 0)), before)
        many = table(experts, tasks=50)
        for task in range(50):
            experts(x, *by_task(many, task))
        experts(x.expand(50, 5, D_IN), *by_task(many, *range(50)))
    kept = experts._kept._entries.values()
    assert 0 < sum(len(built[0]) for _, built in kept) <= MOST


@every_kind
def test_inference_mode_and_then_training(make):
    experts, x = make().eval(), random(3, 2, 5, D_IN)
    routing, condition = by_task(table(experts), 0)
    with torch.inference_mode():
        inside = experts(x, routing, condition)
        routed, _ = by_task(table(experts), 0)
        torch.testing.assert_close(experts(x, routed, condition), inside)
    x.requires_grad_()
    outside = experts(x, routing, condition)
    torch.testing.assert_close(outside, inside.clone())
    outside.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in experts.parameters())
    experts.requires_grad_(False)
    gradient = x.grad.clone()
    experts(x, routing, condition).sum().backward()
    torch.testing.assert_close(x.grad, 2 * gradient)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_leaves_stay_wide_in_a_narrow_model_and_the_build_under_autocast(make, dtype):
    experts, x = make().float().eval(), random(3, 2, 5, D_IN).float()
    routing, condition = by_task(table(experts).float(), 0)
    with torch.no_grad():
        expected, down = experts(x, routing, condition), experts.factors(routing.weights[:, 0])[0]
        with torch.autocast("cpu", dtype=dtype):
            auto = experts(x, routing, condition)
        assert auto.dtype == dtype
        moved = experts.to(dtype)
        assert all(leaf.dtype == torch.float32 for leaf in moved.parameters())
        assert torch.equal(moved.factors(routing.weights[:, 0])[0], down)
        out = moved(x.to(dtype), Routing(routing.weights.to(dtype), E), condition)
    assert out.dtype == dtype
    scale = expected.abs().max()
    for narrow in (auto, out):
        assert (narrow.float() - expected).abs().max() < 0.05 * scale
    assert experts.double().leaves()[0].dtype == torch.float64


def test_small_leaves_of_order_four_do_not_underflow_in_half_precision():
    """The released initialisation's products of four are about 3e-9; float16 ends at 6e-8."""
    leaves_of = [[0.008 * random(n, E, RANK, 3).float() for n in range(4)] for _ in range(2)]
    experts = TensorExperts(*leaves_of, 80, 80, norm=True).half()
    down, _ = experts.factors(torch.ones(1, E))
    assert (down != 0).all() and experts(
        torch.ones(2, 80).half(), Routing(torch.ones(E), E), Condition()
    ).isfinite().all()
    assert materialise([leaf.half() for leaf in leaves_of[0]]).eq(0).float().mean() > 0.5


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: poly(heads=5), "heads=5 does not divide"),
        (lambda: PolyExperts(torch.zeros(2, 3, 4), torch.zeros(2, 2, 4)), "rank 3, but up has 2 of rank 2"),
        (lambda: TensorExperts([torch.zeros(2, 3, 4)] * 2, [torch.zeros(2, 3, 4)], 16, 16), "same number of leaves"),
        (lambda: TensorExperts([], [], 16, 16), "0 order positions"),
        (lambda: TensorExperts([torch.zeros(2, 3, 4)] * 2, [torch.zeros(2, 1, 4)] * 2, 16, 16), "same experts"),
        (lambda: TensorExperts([torch.zeros(2, 3, 4)] * 2, [torch.zeros(2, 3, 4)] * 2, 16, 17), "4 x 4 = 16 do not"),
    ],
)
def test_misfits_are_refused(make, word):
    with pytest.raises(ValueError, match=re.escape(word)):
        make()


def test_routings_that_cannot_be_followed_are_refused():
    x = random(3, 2, 5, D_IN)
    for experts, shape, word in (
        (tensor(2), (2, 1, 2, E), "chooses at 2 positions, but these experts take one choice"),
        (ordered(3), (2, 1, 2, E), "chooses at 2 positions, but these experts have 3"),
        (poly(), (2, 1, 1, 1, E), "too many axes for an input of 3"),
    ):
        with pytest.raises(ValueError, match=word):
            experts(x, Routing(torch.ones(shape).double(), E), Condition())


@every_kind
@pytest.mark.parametrize("assign", [False, True])
def test_leaves_that_come_in_half_precision_are_built_in_single(make, assign):
    experts = make()
    state = {name: value.to(torch.bfloat16) for name, value in experts.state_dict().items()}
    for narrow in (copy.deepcopy(experts).float(), experts.float()):
        narrow.load_state_dict(state, assign=assign)
        built = narrow.factors(table(narrow)[:, 0])[0]
        assert built.dtype == torch.float32
        wide = {name: value.float() for name, value in state.items()}
        narrow.load_state_dict(wide, assign=assign)
        assert torch.equal(built, narrow.factors(table(narrow)[:, 0])[0])
        for shape in ((E,), (2, 6, E)):
            narrow(random(3, 2, 6, D_IN).float(), Routing(random(4, *shape).float(), E), Condition())


def test_leaves_given_in_half_precision_become_single():
    for made in (
        PolyExperts(torch.ones(2, 1, 4).bfloat16(), torch.ones(2, 1, 4).bfloat16()),
        TensorExperts([torch.ones(2, 1, 2).half()] * 2, [torch.ones(2, 1, 2).half()] * 2, 4, 4),
        OrderedTensorExperts([torch.ones(2, 1, 1, 2).half()] * 2, [torch.ones(2, 1, 1, 2).half()] * 2, 4, 4),
    ):
        assert all(leaf.dtype == torch.float32 for leaf in made.parameters())


@every_kind
def test_a_routing_of_another_batch_is_refused(make):
    experts = make()
    for rows in (2, 3, 8):
        with pytest.raises(ValueError, match=f"{rows} rows for a batch of 4"):
            experts(random(3, 4, 5, D_IN), Routing(table(experts, tasks=rows), E), Condition())


@every_kind
def test_on_the_meta_device_shapes_come_out(make):
    experts = make().to("meta").eval()
    x = torch.zeros(2, 5, D_IN, device="meta", dtype=torch.float64)
    routing = Routing(table(experts).to("meta"), E)
    ids = Condition(task_ids=torch.zeros(2, dtype=torch.long))
    with torch.no_grad():
        assert experts(x, Routing(routing.weights[:2], E), ids).shape == (2, 5, D_OUT)
