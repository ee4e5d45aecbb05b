"""The leaf trick against plain autograd, the base's own bits where nothing is added, and every granularity."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mixwright.ops import interpolate as module
from mixwright.ops.hard_concrete import mask
from mixwright.ops.interpolate import added, coefficient, interpolate, interpolate_each, interpolate_plain

SHAPES = [(7, 13), (1,), (129,), (3, 2, 5, 3), (0, 4), ()]
UNITS = {"weight": lambda shape: shape, "row": lambda shape: shape[:1], "tensor": lambda shape: ()}


def case(shape, granularity, experts=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    unit = UNITS[granularity](shape)
    base, delta = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    logits = 2 * torch.randn((experts, *unit), generator=generator, dtype=dtype)
    weights = torch.softmax(torch.randn(experts, generator=generator, dtype=dtype), 0)
    return base, delta, logits, weights


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 4)


@pytest.fixture
def buffers_of_nan(monkeypatch):
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(torch.nan))


@pytest.mark.parametrize("chunk", [4, 1 << 15])
@pytest.mark.parametrize("shape,granularity", list(itertools.product(SHAPES, UNITS)))
def test_value_and_gradients_equal_autograd(shape, granularity, chunk, monkeypatch, buffers_of_nan):
    monkeypatch.setattr(module, "CHUNK", chunk)
    tensors = [tensor.requires_grad_() for tensor in case(shape, granularity)]
    value, plain = interpolate(*tensors, strength=0.7), interpolate_plain(*tensors, strength=0.7)
    torch.testing.assert_close(value, plain, rtol=1e-10, atol=1e-12)
    above = torch.randn_like(plain)
    for got, expected in zip(
        torch.autograd.grad(value, tensors, above), torch.autograd.grad(plain, tensors, above), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk", [4, 1 << 15])
@pytest.mark.parametrize("shape,granularity", list(itertools.product(SHAPES, UNITS)))
def test_several_episodes_at_once_equal_autograd_of_each(shape, granularity, chunk, monkeypatch, buffers_of_nan):
    monkeypatch.setattr(module, "CHUNK", chunk)
    base, delta, logits, weights = case(shape, granularity)
    tensors = [t.requires_grad_() for t in (base, delta, logits, torch.stack([weights, weights.flip(0), weights**2]))]
    values = interpolate_each(*tensors, strength=0.7)
    plain = [interpolate_plain(*tensors[:3], each, strength=0.7) for each in tensors[3]]
    above = [torch.randn_like(base) for _ in plain]
    torch.testing.assert_close(values, tuple(plain), rtol=1e-10, atol=1e-12)
    for got, expected in zip(
        torch.autograd.grad(values, tensors, above), torch.autograd.grad(plain, tensors, above), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_an_episode_that_nobody_learns_from_adds_nothing():
    base, delta, logits, weights = (t.requires_grad_() for t in case((5, 3), "weight"))
    first, _ = interpolate_each(base, delta, logits, torch.stack([weights, 1 - weights]))
    got = torch.autograd.grad(first.square().sum(), [base, delta, logits, weights])
    alone = interpolate_plain(base, delta, logits, weights)
    for mine, theirs in zip(
        got, torch.autograd.grad(alone.square().sum(), [base, delta, logits, weights]), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("granularity", UNITS)
def test_gradcheck_and_second_derivatives(granularity, small_chunks):
    tensors = [tensor.requires_grad_() for tensor in case((3, 4), granularity, experts=2)]
    assert torch.autograd.gradcheck(interpolate, tensors)
    assert torch.autograd.gradgradcheck(interpolate, tensors)


@pytest.mark.parametrize("asked", range(4))
def test_only_the_gradients_that_are_asked_for(asked):
    tensors = case((5, 3), "weight")
    tensors[asked].requires_grad_()
    got = torch.autograd.grad(interpolate(*tensors).square().sum(), tensors[asked])[0]
    expected = torch.autograd.grad(interpolate_plain(*tensors).square().sum(), tensors[asked])[0]
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_the_gradient_of_a_shared_change_at_zero_is_not_lost():
    base, _, logits, weights = case((5, 3), "weight")
    delta = torch.zeros_like(base, requires_grad=True)
    interpolate(base, delta, logits, weights).sum().backward()
    torch.testing.assert_close(delta.grad, coefficient(logits, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("granularity", UNITS)
def test_where_nothing_is_added_the_bits_are_the_bases(dtype, granularity, small_chunks):
    base, delta, logits, weights = case((9, 8), granularity, dtype=torch.float32)
    base = base.to(dtype)
    base[::2, ::2] = -0.0
    base[1, 1] = torch.nan
    bits = base.view(torch.int16 if base.element_size() == 2 else torch.int32)

    def same(adapted):
        assert adapted.dtype == dtype
        return adapted.view(bits.dtype) == bits

    assert same(interpolate(base, delta, logits, weights, strength=0.0)).all()
    assert same(interpolate(base, torch.zeros_like(delta), logits, weights)).all()
    assert same(interpolate(base, delta, torch.full_like(logits, -2.0), weights)).all()
    assert same(interpolate(base, torch.full_like(delta, torch.nan), torch.full_like(logits, -2.0), weights)).all()
    mixed = same(interpolate(base, delta, logits, weights))
    out = coefficient(logits, weights) == 0
    assert mixed[out if granularity == "weight" else out.reshape(-1, 1).expand(9, 8)].all()
    assert out.all() or not mixed.all()


def test_low_precision_is_computed_in_float32_and_rounded_once():
    base, delta, logits, weights = case((40, 7), "weight", dtype=torch.float32)
    low = base.bfloat16()
    exact = (low.float() + torch.einsum("m,mij->ij", weights, mask(logits)) * delta).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        adapted = interpolate(low, delta, logits, weights)
    assert torch.equal(adapted, exact)


def test_gradients_have_the_dtypes_of_their_tensors():
    base, delta, logits, weights = case((6, 5), "weight", dtype=torch.float32)
    delta, logits, weights = delta.requires_grad_(), logits.bfloat16().requires_grad_(), weights.requires_grad_()
    interpolate(base.half(), delta, logits, weights).sum().backward()
    assert (delta.grad.dtype, logits.grad.dtype, weights.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)


def test_a_memory_format_is_kept():
    base, delta, logits, weights = case((4, 3, 5, 5), "weight", dtype=torch.float32)
    last = base.to(memory_format=torch.channels_last)
    adapted = interpolate(last, delta, logits, weights)
    assert adapted.stride() == last.stride()
    assert torch.equal(adapted, interpolate(base, delta, logits, weights))


def test_the_coefficient_stays_between_zero_and_one():
    _, _, logits, weights = case((50, 40), "weight", dtype=torch.float32)
    c = coefficient(logits, weights)
    assert c.min() >= 0
    assert c.max() <= 1 + 1e-6


def test_logits_of_another_shape_are_refused():
    base, delta, logits, weights = case((4, 3), "weight")
    with pytest.raises(ValueError, match=r"logits of \(5, 3\).*\(4, 3\)"):
        interpolate(base, delta, logits[:, 0], weights)


@pytest.mark.parametrize("granularity", UNITS)
def test_noise_is_the_seeds_and_its_gradient_that_of_the_same_draw(granularity, small_chunks):
    tensors = [tensor.requires_grad_() for tensor in case((9, 4), granularity)]
    value, plain = interpolate(*tensors, noise=3), interpolate_plain(*tensors, noise=3)
    torch.testing.assert_close(value, plain, rtol=1e-10, atol=1e-12)
    for got, expected in zip(
        torch.autograd.grad(value.square().sum(), tensors),
        torch.autograd.grad(plain.square().sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(interpolate(*tensors, noise=3), value)
    assert not torch.equal(interpolate(*tensors, noise=4), value)
    assert torch.autograd.gradgradcheck(lambda *t: interpolate(*t, noise=3), tensors)


def test_regrowth_lets_dead_masks_feel_the_gradient():
    base, delta, logits, weights = case((6, 5), "weight")
    logits = torch.where(logits > 0, 2.0, -2.0).double().requires_grad_()
    assert not torch.autograd.grad(interpolate(base, delta, logits, weights).sum(), logits)[0].any()
    found = torch.autograd.grad(interpolate(base, delta, logits, weights, 0.5, regrowth=0.1).sum(), logits)[0]
    torch.testing.assert_close(found, 0.05 * weights[:, None, None] * delta.expand(5, 6, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_change_of_zero_adds_nothing_and_still_learns(dtype):
    base = torch.tensor([-0.0, 1.5, torch.nan, -2.0], dtype=dtype)
    change = torch.tensor([0.0, -0.0, 0.0, 1.0], requires_grad=True)
    moved = added(base, change, 0.5)
    assert torch.signbit(moved[0])
    assert moved.dtype == dtype
    assert moved[1] == 1.5
    assert moved[3] == -1.5
    moved.nan_to_num().sum().backward()
    assert change.grad.tolist() == [0.5, 0.5, 0.0, 0.5]


def test_nothing_of_the_size_of_all_masks_is_kept_for_the_gradient():
    base, delta, logits, weights = case((64, 32), "weight", dtype=torch.float32)
    kept = []
    tensors = [tensor.requires_grad_() for tensor in (delta, logits, weights)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        interpolate(base, *tensors)
    own = {tensor.data_ptr() for tensor in (base, *tensors)}
    assert {tensor.data_ptr() for tensor in kept} <= own


def test_nothing_of_the_size_of_all_masks_is_made_but_the_gradient_itself(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 64)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend((t.untyped_storage().data_ptr(), t.numel()) for t in tree_leaves(out) if torch.is_tensor(t))
            return out

    base, delta, logits, weights = case((64, 32), "weight", dtype=torch.float32)
    tensors = [tensor.requires_grad_() for tensor in (delta, logits, weights)]
    given = {tensor.untyped_storage().data_ptr() for tensor in (base, *tensors)}
    with Sizes():
        value = interpolate(base, *tensors)
    assert max(size for place, size in sizes if place not in given) == base.numel()
    sizes.clear()
    above = torch.ones_like(value)
    with Sizes():
        found = torch.autograd.grad(value, tensors, above)
    whole = {place for place, size in sizes if size > base.numel() and place not in given}
    assert whole == {found[1].untyped_storage().data_ptr()}
