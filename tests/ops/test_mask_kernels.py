"""The compiled passes over masks against the plain ones: values, gradients, bits, and that they are taken at all."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixwright.ops import kernels, mask_kernels
from mixwright.ops.hard_concrete import DEAD, expected_l0, hard_count, mask
from mixwright.ops.interpolate import interpolate, interpolate_each, interpolate_plain


@pytest.fixture(scope="module")
def native(compiled):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "kernel", lambda: compiled)
        yield compiled


@pytest.fixture
def buffers_of_nan(monkeypatch):
    empty_like, empty = torch.empty_like, torch.empty
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(
        torch, "empty", lambda *a, **k: (t := empty(*a, **k)).fill_(torch.nan if t.is_floating_point() else 77)
    )


def case(units, experts, seed=0):
    draw = torch.Generator().manual_seed(seed)
    base, delta = (torch.randn(units, generator=draw) for _ in range(2))
    logits = 3 * torch.randn(experts, units, generator=draw)
    weights = torch.softmax(torch.randn(experts, generator=draw), 0)
    weights[torch.rand(experts, generator=draw) < 0.2] = 0
    return base, delta, logits, weights


def agree(units, experts, seed, regrowth=0.0):
    found = [tensor.requires_grad_() for tensor in case(units, experts, seed)]
    wide = [tensor.detach().double().requires_grad_() for tensor in found]
    above = torch.randn(units, generator=torch.Generator().manual_seed(seed + 1))
    value = interpolate(*found, strength=0.6, regrowth=regrowth)
    expected = (interpolate if regrowth else interpolate_plain)(
        *wide, strength=0.6, **({"regrowth": regrowth} if regrowth else {})
    )
    torch.testing.assert_close(value.double(), expected, atol=2e-6, rtol=1e-6)
    grads = torch.autograd.grad(value, found, above), torch.autograd.grad(expected, wide, above.double())
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=5e-6 * (1 + theirs.abs().max().item()), rtol=1e-5)


@settings(max_examples=40)
@given(units=st.integers(1, 1200), experts=st.integers(1, 11), seed=st.integers(0, 9))
def test_it_agrees_with_autograd_at_odd_sizes(native, units, experts, seed):
    del native
    agree(units, experts, seed)


@pytest.mark.parametrize("regrowth", [0.0, 0.25])
def test_it_agrees_over_many_chunks_and_buffers_of_nan(native, buffers_of_nan, regrowth):
    del native, buffers_of_nan
    agree(3 * mask_kernels._CHUNK + 517, 8, 0, regrowth)


@pytest.mark.parametrize("episodes", [2, mask_kernels.MOST_EPISODES, mask_kernels.MOST_EPISODES + 3])
def test_several_episodes_at_once_agree_with_each_alone(native, buffers_of_nan, episodes):
    del native, buffers_of_nan
    base, delta, logits, _ = case(mask_kernels._CHUNK + 517, 5)
    weights = torch.rand(episodes, 5, generator=torch.Generator().manual_seed(3))
    weights[1, 2], weights[:, 4] = 0, 0
    found = [tensor.requires_grad_() for tensor in (base, delta, logits, weights)]
    values = interpolate_each(*found, strength=0.6)
    alone = [interpolate(base, delta, logits, each, 0.6) for each in weights]
    assert all(torch.equal(one, other) for one, other in zip(values, alone, strict=True))
    above = [torch.randn(len(base), generator=torch.Generator().manual_seed(seed)) for seed in range(episodes)]
    for mine, theirs in zip(*(torch.autograd.grad(some, found, above) for some in (values, alone)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=5e-6 * (1 + theirs.abs().max().item()), rtol=1e-5)


def test_masks_end_where_the_plain_ones_do(native):
    del native
    end = torch.tensor(DEAD)
    near = [torch.nextafter(end, torch.tensor(to)) for to in (-9.0, 9.0)]
    ends = torch.stack([end, *near, torch.tensor(torch.nan), torch.tensor(torch.inf)])
    logits = torch.cat([torch.linspace(-5, 5, 4001), ends, -ends])
    z, plain = interpolate(torch.zeros_like(logits), torch.ones_like(logits), logits[None], torch.ones(1)), mask(logits)
    torch.testing.assert_close(z, plain, atol=5e-7, rtol=0, equal_nan=True)
    assert torch.equal(z == 0, plain == 0)
    assert torch.equal(z == 1, plain == 1)


def test_where_nothing_is_added_the_bits_are_the_bases(native):
    del native
    base, delta, logits, weights = case(5000, 3)
    base[::7] = -0.0
    base[5] = torch.nan
    for changed in (
        {"strength": 0.0},
        {"delta": torch.zeros_like(delta)},
        {"logits": torch.full_like(logits, -2.0), "delta": torch.full_like(delta, torch.nan)},
    ):
        adapted = interpolate(**{"base": base, "delta": delta, "logits": logits, "weights": weights, **changed})
        assert torch.equal(adapted.view(torch.int32), base.view(torch.int32))
    adapted, out = interpolate(base, delta, logits, weights), (mask(logits) * weights[:, None]).sum(0) == 0
    assert out.any() and not out.all()
    assert torch.equal(adapted[out].view(torch.int32), base[out].view(torch.int32))


@settings(max_examples=40)
@given(units=st.integers(1, 40_000), experts=st.integers(1, 9), seed=st.integers(0, 9))
def test_counts_and_expected_l0_agree_at_odd_sizes(native, units, experts, seed):
    del native
    logits = case(units, experts, seed)[2].requires_grad_()
    assert torch.equal(hard_count(logits.detach()), (logits > DEAD).sum(1))
    wide, above = logits.detach().double().requires_grad_(), torch.randn(experts)
    plain = torch.sigmoid(wide - DEAD).mean(1)
    value = expected_l0(logits)
    torch.testing.assert_close(value.double(), plain, atol=1e-6, rtol=1e-6)
    mine, theirs = torch.autograd.grad(value, logits, above)[0], torch.autograd.grad(plain, wide, above.double())[0]
    torch.testing.assert_close(mine.double(), theirs, atol=1e-6 / units, rtol=1e-5)


def test_results_do_not_depend_on_threads(native):
    del native
    tensors = [tensor.requires_grad_() for tensor in case(5 * mask_kernels._CHUNK + 3, 4)]
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            value = interpolate(*tensors)
            found.append([value, expected_l0(tensors[2]), *torch.autograd.grad(value.square().sum(), tensors)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.fixture
def calls(compiled, monkeypatch):
    """Names of the compiled functions, as they are called."""
    seen = []

    def spy(name):
        function = getattr(compiled, name)
        return lambda *given: (seen.append(name), function(*given))[1]

    monkeypatch.setattr(kernels, "kernel", lambda: kernels.Kernels(*(spy(name) for name in kernels.Kernels._fields)))
    return seen


def test_the_compiled_passes_are_taken_for_float32_masks_per_weight(calls):
    base, delta, logits, weights = (tensor.requires_grad_() for tensor in case(700, 3))
    interpolate(base, delta, logits, weights).sum().backward()
    expected_l0(logits).sum().backward()
    hard_count(logits.detach())
    assert calls == ["interpolate", "interpolate_backward", "mask_sums", "expected_l0_backward", "mask_sums"]


def test_what_does_not_fit_goes_the_plain_way(calls):
    base, delta, logits, weights = case(60, 3)
    for other in (
        (base.double(), delta.double(), logits.double(), weights.double()),
        (base.bfloat16(), delta, logits, weights),
        (base.view(6, 10), delta.view(6, 10), logits[:, :6], weights),
        (base[::2], delta[::2], logits[:, ::2], weights),
    ):
        interpolate(*(tensor.requires_grad_(i == 1) for i, tensor in enumerate(other)))
    interpolate(base, delta, logits, weights, noise=1)
    assert calls == []


def test_the_masks_of_several_episodes_are_passed_over_once(calls):
    base, delta, logits, weights = (tensor.requires_grad_() for tensor in case(700, 3))
    values = interpolate_each(base, delta, logits, torch.stack([weights] * 4))
    torch.stack(values).sum().backward()
    assert calls == ["interpolate", "interpolate_backward"]
