"""Every way of building a factor from leaves agrees with the products written out, values and gradients."""

import itertools
import math

import pytest
import torch

from mixwright.ops.tensor_product import (
    build,
    build_reference,
    ceil_radices,
    dead_entries,
    exact_radices,
    expand,
    materialise,
    mix,
    product_moments,
    project,
)

CHOICES, TERMS, RANK = 3, 5, 2
every_case = pytest.mark.parametrize(
    ("order", "width", "radices", "norm"),
    [
        (order, width, radices, norm)
        for order, width, norm in itertools.product((1, 2, 3, 4), (23, 36, 100), (False, True))
        for radices in (ceil_radices, exact_radices)
    ],
)


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaves(radices, *leading, scale=1.0):
    return [(scale * random(n, *leading, RANK, q)).requires_grad_() for n, q in enumerate(radices)]


def weights(*leading):
    return random(99, *leading, TERMS).sigmoid().requires_grad_()


def gradients(out, inputs):
    return torch.autograd.grad(out, inputs, random(7, *out.shape), retain_graph=True)


@every_case
@pytest.mark.parametrize("own", [(), (CHOICES,)], ids=["shared", "own"])
def test_the_fused_build_is_the_reference(order, width, radices, norm, own):
    given, w = leaves(radices(width, order), *own, TERMS), weights(CHOICES)
    expected, built = build_reference(given, w, width, norm), build(given, w, width, norm)
    assert built.shape == (CHOICES, RANK, width)
    torch.testing.assert_close(built, expected, atol=1e-12, rtol=1e-12)
    for mine, theirs in zip(gradients(built, [*given, w]), gradients(expected, [*given, w]), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=1e-12)


@every_case
@pytest.mark.parametrize("own", [(), (CHOICES,)], ids=["shared", "own"])
def test_mode_products_are_products_with_the_built_factor(order, width, radices, norm, own):
    given, w = leaves(radices(width, order), *own, TERMS), weights(CHOICES)
    x, h = random(3, CHOICES, width).requires_grad_(), random(4, CHOICES, RANK).requires_grad_()
    factor = build_reference(given, w, width, norm)
    for mine, theirs, inputs in (
        (project(x, given, w, norm), torch.einsum("cd,crd->cr", x, factor), [*given, w, x]),
        (expand(h, given, w, width, norm), torch.einsum("cr,crd->cd", h, factor), [*given, w, h]),
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=1e-12)
        for ours, expected in zip(gradients(mine, inputs), gradients(theirs, inputs), strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-11)


def test_tokens_of_any_axes_share_one_choice():
    given, w, x = leaves((3, 4), TERMS), weights(), random(3, 2, 6, 11)
    factor = build_reference(given, w[None], 11)[0]
    torch.testing.assert_close(project(x, given, w), x @ factor.T, atol=1e-12, rtol=1e-12)
    h = random(4, 2, 6, RANK)
    torch.testing.assert_close(expand(h, given, w, 11), h @ factor, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("norm", [False, True])
def test_gradcheck_of_the_fused_build(order, norm):
    given = [random(n, TERMS, RANK, 2 + n % 2).requires_grad_() for n in range(order)]
    width = math.prod(leaf.shape[-1] for leaf in given) - 1
    w = weights(2)
    assert torch.autograd.gradcheck(lambda w, *given: build(given, w, width, norm), (w, *given))


def test_moments_are_those_of_the_product_written_out():
    left, right = leaves((4, 5), TERMS)
    product = materialise([left, right])
    mean, deviation = product_moments(left, right)
    torch.testing.assert_close(mean, product.mean((-2, -1)), atol=1e-14, rtol=1e-12)
    expected = (product.var((-2, -1), unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(deviation, expected, atol=1e-14, rtol=1e-12)


def test_norm_is_torchs_layer_norm_before_the_cut_and_of_pairs_only():
    one, two, three, four = leaves((3, 4, 2, 3), TERMS)

    def outer(a, b):
        return torch.einsum("srp,srq->srpq", a, b).flatten(-2)

    def normed(product):
        return torch.nn.functional.layer_norm(product, product.shape[-2:])

    pair = normed(outer(one, two))
    torch.testing.assert_close(materialise([one, two], 10, norm=True), pair[..., :10])
    assert torch.equal(materialise([one], 2, norm=True), one[..., :2])
    triple = outer(one, normed(outer(two, three)))
    torch.testing.assert_close(materialise([one, two, three], norm=True), triple)
    torch.testing.assert_close(materialise([one, two, three, four], norm=True), outer(pair, normed(outer(three, four))))


def test_the_first_leaf_is_the_slowest_index():
    given = leaves((2, 3, 2, 3), TERMS)
    one, two, three, four = given
    expected = torch.einsum("sra,srb,src,srd->srabcd", one, two, three, four).flatten(2)
    torch.testing.assert_close(materialise(given), expected)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_order_routing_is_the_mixture_of_all_combinations(order):
    """II = sum over s_1..s_N of prod_n w_{n, s_n} times the product of those leaves: R^N implicit experts."""
    radices = (3, 2, 3, 2)[:order]
    given, w = leaves(radices, TERMS, 1), weights(order)
    mixed = build(mix(given, w[None]), torch.ones(1, 1).double(), math.prod(radices))[0]
    expected = torch.zeros_like(mixed)
    for choice in itertools.product(range(TERMS), repeat=order):
        strength = math.prod(w[n, s].item() for n, s in enumerate(choice))
        expected += strength * materialise([leaf[s] for leaf, s in zip(given, choice)])[0]
    torch.testing.assert_close(mixed, expected, atol=1e-11, rtol=1e-11)


def test_scaling_one_leaf_up_and_another_down_changes_nothing():
    one, two, three = leaves((3, 4, 2), TERMS)
    w = weights(2)
    torch.testing.assert_close(build([4 * one, two, three / 4], w, 20), build([one, two, three], w, 20))


def test_no_choices_no_tokens_no_nan():
    given = leaves((3, 4), TERMS)
    for norm in (False, True):
        assert build(given, torch.zeros(0, TERMS).double(), 11, norm).shape == (0, RANK, 11)
        assert project(torch.zeros(0, 11).double(), given, weights(), norm).shape == (0, RANK)
        assert expand(torch.zeros(0, RANK).double(), given, weights(), 11, norm).shape == (0, 11)
        still = [torch.zeros_like(leaf).requires_grad_() for leaf in given]
        out = build(still, weights(2), 11, norm)
        assert out.eq(0).all()
        assert all(g.isfinite().all() for g in gradients(out, still))


@pytest.mark.parametrize("width", [1, 2, 7, 12, 97, 100, 101, 384, 768, 1538, 2048, 4096, 5120])
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_radices_cover_the_width(width, order):
    authors, exact = ceil_radices(width, order), exact_radices(width, order)
    q = authors[0]
    assert authors == (q,) * order
    assert q**order >= width > (q - 1) ** order
    assert len(exact) == order
    assert sorted(exact) == list(exact)
    assert math.prod(exact) >= width
    assert not any(dead_entries(width, exact))
    for radices in (authors, exact):
        read = set(itertools.islice(itertools.product(*map(range, radices)), width))
        alive = [len({index[n] for index in read}) for n in range(order)]
        assert dead_entries(width, radices) == tuple(q - a for q, a in zip(radices, alive))


@pytest.mark.parametrize(
    ("width", "order", "radices"),
    [
        (768, 2, (24, 32)), (768, 4, (4, 4, 6, 8)), (2048, 2, (32, 64)), (2048, 4, (4, 8, 8, 8)),
        (5120, 2, (64, 80)), (5120, 4, (8, 8, 8, 10)), (97, 2, (9, 11)),
    ],
)  # fmt: skip
def test_exact_radices_of_common_widths(width, order, radices):
    assert exact_radices(width, order) == radices


def test_radices_of_perfect_powers_are_exact():
    """3125 ** (1 / 5) and 32768 ** (1 / 5) round up to 6 and 9 in floating point."""
    for base, order in ((5, 5), (8, 5), (7, 4), (199, 3), (10, 6)):
        assert ceil_radices(base**order, order) == (base,) * order
        assert ceil_radices(base**order + 1, order) == (base + 1,) * order
