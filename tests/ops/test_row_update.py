"""The rules of single rows: the compiled twin against torch, and both against what is written in a textbook."""

import math

import pytest
import torch
from torch import Tensor

from mixwright.ops import kernels, row_kernels, row_update
from mixwright.ops.missed_steps import Moments, missed_steps
from mixwright.ops.row_update import AdamWStep
from mixwright.ops.stochastic_rounding import noise_key, round_stochastically

EXPERTS, PARTS = 50, 2
RULE = AdamWStep(step=3, lr=0.01, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)


def made(width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    rows, first, second = (torch.randn(EXPERTS, width, generator=g) for _ in range(3))
    return rows.to(dtype), first * 0.01, second.square() * 1e-4


def some(seed: int = 0) -> Tensor:
    return torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(seed))[:17].sort().values


@pytest.fixture
def native(compiled: kernels.Kernels, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the C functions as they are called."""
    called = list[str]()

    def watched(name: str):
        function = getattr(compiled, name)
        return lambda *arguments: (called.append(name), function(*arguments))[1]

    watching = type(compiled)(*(watched(name) for name in compiled._fields))
    monkeypatch.setattr(kernels, "kernel", lambda: watching)
    return called


def missed(starts: Tensor, step: int, dtype: torch.dtype = torch.float32, decay: float = 0.001):
    rates = torch.linspace(0.001, 0.02, step + 1, dtype=torch.float64)
    decays = torch.arange(step + 1) * math.log1p(-decay)
    return missed_steps(starts, step, rates, decays.double(), Moments(0.9, 0.999, 1e-8), dtype), rates


@pytest.mark.parametrize("width", [1, 7, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("every", [False, True])
def test_the_compiled_adamw_is_the_plain_one(native: list[str], width: int, dtype: torch.dtype, every: bool) -> None:
    ids = None if every else some()
    gradient = torch.randn(EXPERTS if ids is None else len(ids), width, generator=torch.Generator().manual_seed(1))
    one, two = made(width, dtype), made(width, dtype)
    row_update.adamw_rows(*one, ids, gradient, RULE, 5)
    row_kernels.adamw_rows(*two, ids, gradient, RULE, 5)
    assert native == ["adamw_rows"]
    same(one, two)
    if ids is not None:
        others = torch.ones(EXPERTS, dtype=torch.bool).index_fill_(0, ids, False)
        assert all(torch.equal(a[others], b[others]) for a, b in zip(two, made(width, dtype), strict=True))


@pytest.mark.parametrize("width", [7, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e-5, 1e-8])  # gradients far above eps, about it, and below
def test_the_compiled_replay_is_the_plain_one(native: list[str], width: int, dtype: torch.dtype, size: float) -> None:
    ids, starts = some(), torch.tensor([1, 4, 200, 395])
    which = torch.arange(len(ids)) % len(starts)
    replay, _ = missed(starts, 400)
    one, two = made(width, dtype), made(width, dtype)
    for _, first, second in (one, two):
        first *= size
        second *= size**2
        first[:, 0] = second[:, 0] = 0  # as where no gradient ever was
    row_update.replay_rows(*one, ids, which, replay, 1e-8, 5)
    row_kernels.replay_rows(*two, ids, which, replay, 1e-8, 5)
    assert native == ["replay_rows"]
    same(one, two)


@pytest.mark.parametrize("width", [7, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("every", [False, True])
def test_the_compiled_adagrad_is_the_plain_one(native: list[str], width: int, dtype: torch.dtype, every: bool) -> None:
    ids = None if every else some()
    rows = made(PARTS * width, dtype)[0]
    count = EXPERTS if ids is None else len(ids)
    gradient = torch.randn(count, PARTS * width, generator=torch.Generator().manual_seed(1))
    results: list[tuple[Tensor, Tensor]] = []
    for rule in (row_update.adagrad_rows, row_kernels.adagrad_rows):
        table, sums = rows.clone(), torch.full((EXPERTS, PARTS), 0.5)
        rule(table, sums, ids, gradient, 0.1, 1e-10, 0.99, 5)
        results.append((table, sums))
    assert native == ["adagrad_rows"]
    same(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_decay_is_the_plain_one(native: list[str], dtype: torch.dtype) -> None:
    ids, results = some(), []
    for rule in (row_update.decay_rows, row_kernels.decay_rows):
        table = made(300, dtype)[0]
        rule(table, ids, torch.linspace(0.1, 0.9, len(ids)), 5)
        results.append((table,))
    assert native == ["decay_rows"]
    same(*results)


def same(one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> None:
    for a, b in zip(one, two, strict=True):
        step = 2.0**-7 if a.dtype == torch.bfloat16 else 3e-6  # a last bit in float32 may tip the rounding
        assert torch.allclose(a.float(), b.float(), rtol=step, atol=1e-7)
        if a.dtype == torch.bfloat16:
            assert (a == b).float().mean() > 0.98


def test_lagging_rows_are_found_once_frozen_ones_never_and_strangers_are_refused(native: list[str]) -> None:
    frozen = torch.zeros(EXPERTS, dtype=torch.bool)
    frozen[3] = True
    ids = torch.tensor([7, 3, 7, 9, 1, 9])
    for find in (row_kernels.lagging_rows, row_kernels._lagging_rows):
        last = torch.arange(EXPERTS, dtype=torch.int32)
        found, starts = find(ids, last, 9, frozen)
        assert sorted(zip(found.tolist(), starts.tolist(), strict=True)) == [(1, 1), (7, 7)]
        assert [last[i].item() for i in (1, 3, 7, 9)] == [9, 9, 9, 9] and last[2] == 2
    assert native == ["lagging_rows"]
    for bad in (-1, EXPERTS):
        with pytest.raises(IndexError, match="outside of the 50"):
            row_kernels.lagging_rows(torch.tensor([0, bad]), torch.zeros(EXPERTS, dtype=torch.int32), 1, None)


def test_other_types_go_the_plain_way(native: list[str]) -> None:
    tensors = [t.double() for t in made(4)]
    row_kernels.adamw_rows(*tensors, some(), torch.ones(17, 4), RULE, 5)
    row_kernels.decay_rows(made(8)[0].T, torch.arange(3), torch.ones(3), 5)
    assert native == []


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.95, 0.98), (0.0, 0.9), (0.99, 0.9999)])
@pytest.mark.parametrize(("start", "gap"), [(1, 1), (1, 600), (30, 40), (1000, 300)])
def test_missed_steps_are_those_of_the_loop_whatever_the_second_moment(
    betas: tuple[float, float], start: int, gap: int
) -> None:
    step, (b1, b2) = start + gap, betas
    roots = torch.cat([torch.zeros(1), 10.0 ** torch.arange(-13, 3)]).double()
    rates = (torch.arange(step + 1).double() / 7).cos().add(1.1) * 1e-2
    decays = torch.cat([torch.zeros(1).double(), torch.log1p(-0.1 * rates[1:]).cumsum(0)])
    p, m, v = torch.linspace(-1, 1, 17).double(), 0.3 * roots, roots.square()
    replay = missed_steps(torch.tensor([start]), step, rates, decays, Moments(b1, b2, 1e-8), torch.float64)
    rows = [t.clone()[None] for t in (p, m, v)]
    row_update.replay_rows(*rows, torch.tensor([0]), torch.tensor([0]), replay, 1e-8, 0)
    for j in range(start + 1, step + 1):
        m, v = m * b1, v * b2
        p = p * (1 - 0.1 * rates[j]) - rates[j] / (1 - b1**j) * m / (v.sqrt() / (1 - b2**j) ** 0.5 + 1e-8)
    for ours, looped in zip(rows, (p, m, v), strict=True):
        torch.testing.assert_close(ours[0], looped, rtol=1e-15 * max(16, gap), atol=1e-15 * max(16, gap))


@pytest.mark.parametrize(("value", "gap"), [(1.001, -7), (-3.3e-5, -22), (0.7777, -8), (1e-30, -107)])
def test_stochastic_rounding_keeps_the_mean_and_only_picks_neighbours(value: float, gap: int) -> None:
    values, ids = torch.full((100, 10), value), torch.arange(100)
    rounded = torch.stack([round_stochastically(values, ids, noise_key(3, step, 0)) for step in range(10)]).double()
    assert abs(rounded.mean() - values[0, 0].double()) <= 4 * 0.5 * 2.0**gap / rounded.numel() ** 0.5
    low, high = rounded.unique()
    assert high - low == 2.0**gap and low < values[0, 0] < high


def test_stochastic_rounding_leaves_what_bfloat16_holds() -> None:
    exact = torch.tensor([[0.0, -2.0, 1.0078125]])
    assert torch.equal(round_stochastically(exact, torch.tensor([0]), 1).float(), exact)
    strange = torch.tensor([[math.inf, -math.inf, math.nan]])
    assert round_stochastically(strange, torch.tensor([0]), 1).float().tolist()[0][:2] == [math.inf, -math.inf]
    assert round_stochastically(strange, torch.tensor([0]), 1)[0, 2].isnan()


def test_noise_differs_between_rows_columns_and_steps() -> None:
    values = torch.full((4, 4000), 1 + 2.0**-8)
    one = round_stochastically(values, torch.arange(4), noise_key(0, 1, 0)).float()
    assert ((one > 1).float().mean(1) - 0.5).abs().max() < 0.05
    for other in (noise_key(0, 2, 0), noise_key(0, 1, 1), noise_key(1, 1, 0)):
        equal = (round_stochastically(values, torch.arange(4), other).float() == one).float().mean()
        assert abs(equal - 0.5) < 0.05
    assert abs((one[0] == one[1]).float().mean() - 0.5) < 0.05
    far = round_stochastically(values, torch.arange(4) + (1 << 40), noise_key(0, 1, 0)).float()
    assert abs((far == one).float().mean() - 0.5) < 0.05
