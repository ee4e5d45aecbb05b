"""The compiled build of both factors against the reference, values and gradients. Skipped without a C compiler."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixwright.ops import fused_build, kernels
from mixwright.ops.fused_build import build_factors
from mixwright.ops.tensor_product import build_reference, ceil_radices, exact_radices


@pytest.fixture(scope="module")
def native(compiled):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "kernel", lambda: compiled)
        yield compiled


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case(order, width, radices, choices, terms, rank, own=False):
    leading = (choices, terms) if own else (terms,)
    leaves = [random(n, *leading, rank, q).requires_grad_() for n, q in enumerate(radices(width, order))]
    return leaves, random(99, choices, terms).sigmoid().requires_grad_()


def both(function, down, up, weights, d_in, d_out):
    """Factors and the gradients of everything."""
    factors = function(down, up, weights, d_in, d_out)
    seeds = [random(number, *factor.shape).to(factor.dtype) for number, factor in enumerate(factors)]
    return factors, torch.autograd.grad(factors, [weights, *down, *up], seeds)


def reference(down, up, weights, d_in, d_out):
    return build_reference(down, weights, d_in), build_reference(up, weights, d_out)


def agree(down, up, weights, d_in, d_out):
    wide = [[leaf.detach().double().requires_grad_() for leaf in leaves] for leaves in (down, up)]
    expected = both(reference, *wide, weights.detach().double().requires_grad_(), d_in, d_out)
    found = both(build_factors, down, up, weights, d_in, d_out)
    assert "_Build" in type(found[0][0].grad_fn).__name__
    for mine, theirs in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=2e-4 * (1 + theirs.abs().max().item()), rtol=1e-4)


sizes = st.tuples(
    st.integers(2, 4), *(st.integers(1, high) for high in (400, 400, 4, 20, 37)), st.booleans(), st.booleans()
)


@settings(deadline=None, max_examples=60)
@given(drawn=sizes)
def test_it_agrees_with_the_reference_at_odd_sizes(native, drawn):
    del native
    order, d_in, d_out, choices, terms, rank, own, exact = drawn
    radices = exact_radices if exact else ceil_radices
    down, weights = case(order, d_in, radices, choices, terms, rank, own)
    up, _ = case(order, d_out, radices, choices, terms, rank, own)
    agree(down, up, weights, d_in, d_out)


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("width", [768, 2048, 5120])
def test_it_agrees_at_real_widths(native, order, width):
    del native
    down, weights = case(order, width, ceil_radices, 2, 8, 4)
    up, _ = case(order, 2048, exact_radices, 2, 8, 4)
    agree(down, up, weights, width, 2048)


def test_gradients_beyond_the_end_and_of_dead_entries_are_not_read(native):
    """A gradient whose buffer is followed by NaN gives the same; entries that nobody reads get exactly zero."""
    del native
    (down, weights), (up, _) = (case(2, 23, ceil_radices, 1, 3, 2) for _ in range(2))
    factors = build_factors(down, up, weights, 23, 23)
    clean = torch.autograd.grad(factors, [weights, *down], [torch.ones(1, 2, 23)] * 2, retain_graph=True)
    poisoned = torch.full((200,), torch.nan)
    poisoned[:46] = 1.0
    seeds = [poisoned[:46].view(1, 2, 23)] * 2
    for mine, theirs in zip(torch.autograd.grad(factors, [weights, *down], seeds), clean, strict=True):
        assert torch.equal(mine, theirs)
    (wide, weights), (other, _) = (case(4, 768, ceil_radices, 1, 3, 2) for _ in range(2))
    factors = build_factors(wide, other, weights, 768, 768)
    gradient = torch.autograd.grad(factors[0].sum() + factors[1].sum(), wide[0])[0]
    assert gradient[..., -2:].eq(0).all() and gradient[..., :-2].ne(0).all()


def test_results_are_written_in_full(native, monkeypatch):
    del native
    leaves, weights = case(3, 100, ceil_radices, 2, 3, 2)
    expected = both(build_factors, leaves, leaves, weights, 100, 100)
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda tensor, *sizes: new_empty(tensor, *sizes).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda tensor: empty_like(tensor).fill_(torch.nan))
    for mine, theirs in zip(both(build_factors, leaves, leaves, weights, 100, 100), expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


def test_the_number_of_threads_does_not_change_a_bit(native):
    del native
    (down, weights), (up, _) = (case(2, 2048, ceil_radices, 6, 8, 16) for _ in range(2))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = both(build_factors, down, up, weights, 2048, 2048)
        torch.set_num_threads(3)
        three = both(build_factors, down, up, weights, 2048, 2048)
    finally:
        torch.set_num_threads(threads)
    for mine, theirs in zip(one, three, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_one_factor_alone_and_frozen_leaves_have_gradients(native):
    del native
    (down, weights), (up, _) = (case(2, 23, ceil_radices, 1, 3, 2) for _ in range(2))
    first, _ = build_factors(down, up, weights, 23, 23)
    expected = torch.autograd.grad(build_reference(down, weights, 23).sum(), [weights, *down])
    for mine, theirs in zip(torch.autograd.grad(first.sum(), [weights, *down]), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    frozen = [leaf.detach() for leaf in down]
    first, _ = build_factors(frozen, [leaf.detach() for leaf in up], weights, 23, 23)
    torch.testing.assert_close(torch.autograd.grad(first.sum(), weights)[0], expected[0])


def test_what_it_does_not_take_goes_the_plain_way(native, monkeypatch):
    del native
    monkeypatch.setattr(fused_build, "_Build", None)
    for order, change in ((1, lambda leaf: leaf), (2, torch.Tensor.double), (3, lambda leaf: leaf.mT.contiguous().mT)):
        down, weights = ([change(leaf.detach()) for leaf in made] if isinstance(made, list) else change(made.detach())
                         for made in case(order, 23, ceil_radices, 2, 3, 2))  # fmt: skip
        found = build_factors(down, down, weights, 23, 23)
        torch.testing.assert_close(found[0], build_reference(down, weights, 23))
    down, weights = case(2, 23, ceil_radices, 2, 3, 2)
    torch.testing.assert_close(
        build_factors(down, down, weights, 23, 23, norm=True)[1], build_reference(down, weights, 23, norm=True)
    )
    large = [torch.zeros(2, 1, q) for q in (2, 1 << 15)]
    assert math.prod(build_factors(large, large, torch.ones(1, 2), 9, 9)[0].shape) == 9


@pytest.mark.parametrize("order", [2, 3, 4])
def test_a_gradient_of_the_gradient_is_the_references(native, order):
    del native
    (down, weights), (up, _) = (case(order, 23, ceil_radices, 2, 3, 2) for _ in range(2))
    seconds = []
    for function in (build_factors, reference):
        made = function(down, up, weights, 23, 23)
        first = torch.autograd.grad(sum(f.square().sum() for f in made), [weights, *down], create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), [weights, *down, *up]))
    for mine, theirs in zip(*seconds, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=1e-4 * (1 + theirs.abs().max().item()))


def test_without_gradients_it_is_taken_too(native, monkeypatch):
    del native
    (down, weights), (up, _) = (case(4, 23, ceil_radices, 2, 3, 2) for _ in range(2))
    monkeypatch.setattr(fused_build, "build", None)
    with torch.no_grad():
        found, expected = build_factors(down, up, weights, 23, 23), reference(down, up, weights, 23, 23)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        assert not mine.requires_grad
