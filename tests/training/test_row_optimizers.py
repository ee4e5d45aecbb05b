"""Optimisers that touch retrieved rows only, against the dense ones that they must equal."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mixwright as mw
from mixwright.experts.table import NeuronTable
from mixwright.ops import kernels
from mixwright.training.row_optimizer import AbstractRowOptimizer

EXPERTS, PARTS, WIDTH = 30, 2, 5


def table(dtype: torch.dtype = torch.float64, bias: bool = False, seed: int = 0) -> NeuronTable:
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(EXPERTS, PARTS, WIDTH, generator=g, dtype=torch.float64).to(dtype)
    own = torch.randn(EXPERTS, PARTS - 1, generator=g, dtype=torch.float64).to(dtype) if bias else None
    return NeuronTable(rows, own)


def rate(step: int) -> float:
    """Warm-up from 0, then a cosine."""
    return min(1.0, step / 10) * (0.55 + 0.45 * math.cos(step / 25))


class Draws:
    """For each step the rows that are touched, and their gradients over many sizes."""

    def __init__(self, share: float = 0.1, seed: int = 0) -> None:
        self.g, self.share = torch.Generator().manual_seed(seed), share

    def __call__(self, shape: torch.Size, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        ids = (torch.rand(shape[0], generator=self.g) < self.share).nonzero()[:, 0]
        size = 10 ** (torch.rand(len(ids), generator=self.g) * 9 - 8)
        values = torch.randn((len(ids), *shape[1:]), generator=self.g, dtype=torch.float64)
        return ids, (values * size.view(-1, *[1] * (len(shape) - 1))).to(dtype)


def compact(ids: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    return torch.sparse_coo_tensor(ids[None], values, shape, check_invariants=False)


def dense(ids: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    return values.new_zeros(shape).index_add_(0, ids, values)


def lr_of(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


@pytest.mark.parametrize(
    ("betas", "share", "decay"), [((0.9, 0.999), 0.1, 0.1), ((0.9, 0.999), 0.01, 0.0), ((0.9, 0.95), 0.01, 0.1)]
)
def test_lazy_adamw_is_dense_adamw(betas: tuple[float, float], share: float, decay: float) -> None:
    lazy, twin = table(bias=True), table(bias=True)
    ours = mw.LazyAdamW(lazy, lr=0.01, betas=betas, weight_decay=decay)
    theirs = torch.optim.AdamW(twin.parameters(), lr=0.01, betas=betas, weight_decay=decay)
    draws, worst, lagged = Draws(share), 0.0, 0
    for step in range(200):
        lr_of(ours, 0.02 * rate(step))
        lr_of(theirs, 0.02 * rate(step))
        for mine, other in zip(lazy.parameters(), twin.parameters(), strict=True):
            drawn = draws(mine.shape)
            mine.grad, other.grad = compact(*drawn, mine.shape), dense(*drawn, mine.shape)
            if step % 90 == 50:
                mine.grad = other.grad  # `auto` may change from step to step
        ours.step()
        theirs.step()
        lagged += int((ours.state[lazy.rows]["last"] < step + 1).sum())
        rows, bias = lazy.take(torch.tensor([step % EXPERTS, 3, 3]))
        ids = [step % EXPERTS, 3, 3]
        worst = max(worst, gap(rows, twin.rows[ids]), gap(bias, twin.bias[ids]))
    assert lagged > 200 * EXPERTS / 2
    ours.flush()
    assert max(worst, gap(lazy.rows, twin.rows), gap(lazy.bias, twin.bias)) <= 1e-12
    for name in ("exp_avg", "exp_avg_sq"):
        assert gap(ours.state[lazy.rows][name], theirs.state[twin.rows][name]) <= 1e-12


def gap(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def test_a_module_is_trained_whole_through_layers_that_share_a_table() -> None:
    ours, theirs = shared_model(), shared_model()
    lazy = mw.LazyAdamW(ours, lr=0.01, table_lr=0.04, weight_decay=0.05)
    rows = {id(theirs.table.rows)}
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in theirs.parameters() if id(p) not in rows]},
            {"params": [theirs.table.rows], "lr": 0.04},
        ],
        lr=0.01,
        weight_decay=0.05,
    )
    g = torch.Generator().manual_seed(0)
    for _ in range(40):
        x, one, two = (torch.randn(3, WIDTH, generator=g).double(), *torch.randint(EXPERTS, (2, 3, 2), generator=g))
        losses = []
        for model, optimizer in ((ours, lazy), (theirs, adamw)):
            optimizer.zero_grad()
            for micro in range(2):  # two passes add up
                loss = model(x + micro, one + micro - 1, two).square().sum()
                loss.backward()
            sparse = model is ours
            if sparse:
                model.table.rows.grad = model.table.rows.grad.to_sparse(1)
                norm = optimizer.clip_grad_norm_(0.3)
            else:
                norm = nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
            losses.append((loss.item(), norm.item()))
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    saved = ours.state_dict()
    for name, tensor in theirs.state_dict().items():
        assert gap(saved[name], tensor) <= 1e-12, name


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = table()
        self.between = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.again = self.table

    def forward(self, x: Tensor, one: Tensor, two: Tensor) -> Tensor:
        one, two = one % EXPERTS, two % EXPERTS
        weights = torch.ones(one.shape, dtype=x.dtype)
        hidden = self.between(self.table(x, weights, one, "silu"))
        return self.again(hidden, weights, two, "silu")


def shared_model() -> Shared:
    torch.manual_seed(0)
    return Shared()


def hand_adagrad(rows: Tensor, sums: Tensor, gradient: Tensor, lr: float, eps: float, decay: float) -> None:
    for expert in range(EXPERTS):
        for part in range(PARTS):
            g = gradient[expert, part]
            sums[expert, part] += sum(x * x for x in g.tolist()) / WIDTH
            rows[expert, part] *= 1 - lr * decay
            rows[expert, part] -= lr * g / (math.sqrt(sums[expert, part]) + eps)


@pytest.mark.parametrize("decay", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rowwise_adagrad_is_the_rule_on_every_row(decay: float, dtype: torch.dtype) -> None:
    lazy, rows, sums = table(dtype), table().rows.detach().clone(), torch.zeros(EXPERTS, PARTS, dtype=torch.float64)
    optimizer = mw.RowwiseAdagrad(lazy, table_lr=0.1, weight_decay=decay, eps=1e-10)
    draws, close = Draws(), 1e-12 if dtype == torch.float64 else 3e-5
    for step in range(40):
        lr = 0.1 * rate(step)
        lr_of(optimizer, lr)
        ids, values = draws(rows.shape)
        lazy.rows.grad = compact(ids, values.to(dtype), rows.shape)
        optimizer.step()
        hand_adagrad(rows, sums, dense(ids, values, rows.shape), lr, 1e-10, decay)
        assert gap(lazy.take(torch.tensor([step % EXPERTS]))[0].double(), rows[[step % EXPERTS]]) <= close
    optimizer.flush()
    assert gap(lazy.rows.double(), rows) <= close


MAKE: list[Callable[..., AbstractRowOptimizer]] = [mw.LazyAdamW, mw.RowwiseAdagrad]


@pytest.mark.parametrize("make", MAKE)
def test_compact_and_dense_gradients_do_the_same_and_duplicates_add(make: Callable[..., AbstractRowOptimizer]) -> None:
    one, two = table(), table()
    optimizers = [make(t, weight_decay=0.1) for t in (one, two)]
    ids, values = torch.tensor([4, 9, 4, 0]), torch.randn(4, PARTS, WIDTH, dtype=torch.float64)
    for _ in range(3):
        one.rows.grad, two.rows.grad = compact(ids, values, one.rows.shape), dense(ids, values, one.rows.shape)
        for optimizer in optimizers:
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
    optimizers[0].flush()
    assert gap(one.rows, two.rows) <= 1e-15


def test_plain_sgd_is_the_same_from_either_gradient() -> None:
    one, two = table(), table()
    ids, values = Draws(0.5)(one.rows.shape)
    one.rows.grad, two.rows.grad = compact(ids, values, one.rows.shape), dense(ids, values, one.rows.shape)
    for t in (one, two):
        torch.optim.SGD(t.parameters(), lr=0.1).step()
    assert torch.equal(one.rows, two.rows)


@pytest.mark.parametrize("make", MAKE)
def test_rows_nobody_touches_stay_to_the_bit_until_they_are_read(make: Callable[..., AbstractRowOptimizer]) -> None:
    lazy = table(torch.float32)
    before, optimizer = lazy.rows.detach().clone(), make(lazy, weight_decay=0.1)
    lazy.rows.grad = compact(torch.tensor([2, 5]), torch.ones(2, PARTS, WIDTH), lazy.rows.shape)
    for _ in range(3):
        optimizer.step()
    others = [i for i in range(EXPERTS) if i not in (2, 5)]
    assert torch.equal(lazy.rows[others], before[others])
    lazy(torch.ones(1, WIDTH), torch.ones(1, 1), torch.tensor([[7]]), "gelu")
    changed = (lazy.rows != before).any(2).any(1).nonzero()[:, 0].tolist()
    assert changed == [2, 5, 7]


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_rows_never_change_and_do_not_count_in_the_norm(
    make: Callable[..., AbstractRowOptimizer], dtype: torch.dtype
) -> None:
    lazy = table(dtype)
    lazy.frozen = torch.zeros(EXPERTS, dtype=torch.bool)
    lazy.frozen[[1, 5]] = True
    before, optimizer = lazy.rows.detach().clone(), make(lazy, weight_decay=0.1)
    values = torch.ones(3, PARTS, WIDTH, dtype=dtype)
    for gradient in (compact, dense, compact):
        lazy.rows.grad = gradient(torch.tensor([1, 2, 3]), values, lazy.rows.shape)
        assert optimizer.clip_grad_norm_(1e9).item() == pytest.approx(math.sqrt(2 * PARTS * WIDTH), rel=0.01)
        optimizer.step()
    lazy.rows.grad = compact(torch.tensor([1, 2, 3]), values, lazy.rows.shape)
    optimizer.step()  # without clipping
    optimizer.flush()
    assert torch.equal(lazy.rows[[1, 5]], before[[1, 5]])
    assert (lazy.rows[[0, 2, 3]] != before[[0, 2, 3]]).any(2).any(1).all()


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flush", [False, True])
def test_saved_and_continued_is_uninterrupted_to_the_bit(
    make: Callable[..., AbstractRowOptimizer], dtype: torch.dtype, flush: bool
) -> None:
    def steps(lazy: NeuronTable, optimizer: AbstractRowOptimizer, draws: Draws, numbers: range) -> None:
        for step in numbers:
            lr_of(optimizer, 0.05 * rate(step))
            lazy.rows.grad = compact(*draws(lazy.rows.shape, dtype), lazy.rows.shape)
            optimizer.step()

    whole = table(dtype)
    optimizer, draws = make(whole, weight_decay=0.1, seed=7), Draws()
    steps(whole, optimizer, draws, range(20))
    saved = copy.deepcopy((optimizer.state_dict(flush=flush), whole.rows.data, draws.g.get_state()))
    steps(whole, optimizer, draws, range(20, 50))

    again = table(dtype, seed=1)
    with torch.no_grad():
        again.rows.copy_(saved[1])
    other, draws = make(again, weight_decay=0.3, seed=1), Draws()
    other.load_state_dict(saved[0])
    draws.g.set_state(saved[2])
    assert {k: v.dtype for k, v in other.state[again.rows].items()} == {
        k: v.dtype for k, v in optimizer.state[whole.rows].items()
    }
    steps(again, other, draws, range(20, 50))
    assert torch.equal(whole.rows, again.rows)
    optimizer.flush()
    other.flush()
    assert torch.equal(whole.rows, again.rows)


def test_copies_and_saved_weights_are_current_and_follow_nobody() -> None:
    lazy, twin = table(), table()
    optimizer, other = mw.LazyAdamW(lazy, lr=0.1), torch.optim.AdamW(twin.parameters(), lr=0.1)
    for row in (3, 8, 8):
        ids, values = torch.tensor([row]), torch.ones(1, PARTS, WIDTH, dtype=torch.float64)
        lazy.rows.grad, twin.rows.grad = compact(ids, values, lazy.rows.shape), dense(ids, values, lazy.rows.shape)
        optimizer.step()
        other.step()
    assert gap(lazy.rows, twin.rows) > 1e-3
    copied = copy.deepcopy(lazy)
    assert gap(copied.rows, twin.rows) <= 1e-12 and copied.before_read == []
    assert gap(lazy.state_dict()["rows"], twin.rows) <= 1e-12


def test_bfloat16_rows_follow_float32_ones_on_average() -> None:
    finals = []
    exact = table(torch.float32)
    for seed in range(40):
        lazy = table(torch.bfloat16)
        with torch.no_grad():
            exact.rows.copy_(table().rows.bfloat16())
        pair = [(lazy, mw.RowwiseAdagrad(lazy, table_lr=1e-4, seed=seed))]
        pair += [(exact, mw.RowwiseAdagrad(exact, table_lr=1e-4))] if not seed else []
        for t, optimizer in pair:
            for _ in range(20):  # each far below half a bfloat16 step
                t.rows.grad = compact(torch.arange(3), torch.ones(3, PARTS, WIDTH, dtype=t.rows.dtype), t.rows.shape)
                optimizer.step()
        if not seed:
            target = exact.rows[:3].detach().clone()
        finals.append(lazy.rows[:3].detach().float())
    start = table().rows[:3].bfloat16().float()
    moved, wanted = (torch.stack(finals).mean(0) - start).mean().item(), (target - start).mean().item()
    assert moved == pytest.approx(wanted, rel=0.25) and wanted < 0
    nearest = start.bfloat16() - torch.tensor(1e-4).bfloat16()
    assert (nearest.float() == start).float().mean() > 0.5  # what rounding to nearest would have done


def test_the_compiled_rules_train_to_the_same_weights(
    compiled: kernels.Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    for make in MAKE:
        results = []
        for found in (None, compiled):
            monkeypatch.setattr(kernels, "kernel", lambda found=found: found)
            lazy, draws = table(torch.float32), Draws()
            optimizer = make(lazy, weight_decay=0.1)
            for step in range(60):
                lr_of(optimizer, 0.02 * rate(step))
                lazy.rows.grad = compact(*draws(lazy.rows.shape, torch.float32), lazy.rows.shape)
                optimizer.step()
            optimizer.flush()
            results.append(lazy.rows.detach())
        assert gap(*results) <= 2e-6


def test_appended_experts_begin_when_they_come() -> None:
    lazy = table()
    optimizer = mw.LazyAdamW(lazy, lr=0.1, weight_decay=0.1)
    step_on(lazy, optimizer, [0])
    step_on(lazy, optimizer, [0])
    lazy.rows.data = torch.cat([lazy.rows.data, torch.ones(2, PARTS, WIDTH, dtype=torch.float64)])
    lazy.rows.grad, lazy.num_experts = None, EXPERTS + 2
    optimizer.flush()
    assert torch.equal(lazy.rows[-2:], torch.ones_like(lazy.rows[-2:]))
    step_on(lazy, optimizer, [EXPERTS + 1])
    optimizer.flush()
    assert gap(lazy.rows[-2], torch.full((PARTS, WIDTH), 0.99, dtype=torch.float64)) <= 1e-12


def step_on(lazy: NeuronTable, optimizer: AbstractRowOptimizer, ids: list[int]) -> None:
    lazy.rows.grad = compact(
        torch.tensor(ids), torch.ones(len(ids), PARTS, WIDTH, dtype=lazy.rows.dtype), lazy.rows.shape
    )
    optimizer.step()


def test_one_optimiser_at_a_time_follows_a_table() -> None:
    lazy = table()
    first = mw.LazyAdamW(lazy, lr=0.1)
    assert lazy.gradient == "auto" and len(lazy.before_read) == 1
    step_on(lazy, first, [0])
    second = mw.RowwiseAdagrad(lazy)
    assert len(lazy.before_read) == 1
    with pytest.raises(ValueError, match="closed, or another took over its tables"):
        first.step()
    second.close()
    assert lazy.gradient == "dense" and lazy.before_read == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"betas": (0.8, 0.999)}, "betas and eps of a table changed"),
        ({"lr": 20.0, "weight_decay": 0.1}, "must stay below 1"),
    ],
)
def test_settings_that_cannot_be_replayed_are_refused_with_nothing_done(change: dict[str, Any], message: str) -> None:
    lazy = table()
    optimizer = mw.LazyAdamW(lazy, lr=0.1)
    step_on(lazy, optimizer, [0])
    before, state = lazy.rows.detach().clone(), copy.deepcopy(optimizer.state[lazy.rows])
    optimizer.param_groups[0].update(change)
    with pytest.raises(ValueError, match=message):
        step_on(lazy, optimizer, [0])
    assert torch.equal(lazy.rows, before)
    assert all(torch.equal(value, state[name]) for name, value in optimizer.state[lazy.rows].items())


def test_what_cannot_be_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match=r"betas=\(0.99, 0.9\)"):
        mw.LazyAdamW(table(), betas=(0.99, 0.9))
    with pytest.raises(ValueError, match="float16"):
        mw.LazyAdamW(table(torch.float16))


def test_a_closure_is_asked_for_the_loss() -> None:
    lazy = table()
    optimizer = mw.LazyAdamW([lazy, nn.Parameter(torch.ones(2))])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = lazy.rows[3].square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]


def test_a_scheduler_moves_both_kinds_of_groups() -> None:
    model = shared_model()
    optimizer = mw.LazyAdamW(model, lr=0.01, table_lr=0.04)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda n: 0.5**n, lambda n: 0.1**n])
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.004]
