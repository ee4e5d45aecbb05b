"""The exact parts of an update, from Grams alone, against the update and its parts as matrices."""

import pytest
import torch

from mixwright.ops.tensor_product import materialise, mix

from .test_factored import D_IN, D_OUT, KINDS, E, every_kind, random


def drawn(experts, choices=3):
    positions = [] if experts.positions is None else [experts.positions]
    weights = random(5, choices, *positions, experts.num_experts).sigmoid()
    return weights / weights.sum(-1, keepdim=True)


def update(down, up, rank):
    return down.mT @ up / rank


def parts(experts, weights):
    """(choices, orders, experts, d_in, d_out): what each expert adds, written out."""
    whole_down, whole_up = experts.factors(weights)
    if experts.positions is None or hasattr(experts, "heads"):
        alone = [experts.factors(weights * torch.nn.functional.one_hot(torch.tensor(s), E)) for s in range(E)]
        found = [update(down, whole_up, 2) + update(whole_down, up, 2) for down, up in alone]
        return torch.stack(found, 1)[:, None] / experts.rank
    orders = []
    for n in range(experts.positions):
        each = []
        for s in range(E):
            only = weights.clone()
            only[:, n] *= torch.nn.functional.one_hot(torch.tensor(s), E)
            down, up = experts.factors(only)
            each.append((update(down, whole_up, 2) + update(whole_down, up, 2)) / experts.rank)
        orders.append(torch.stack(each, 1))
    return torch.stack(orders, 1)


@every_kind
def test_parts_add_up_to_the_update_of_every_choice(make):
    experts = make()
    weights = drawn(experts)
    found = experts.contribution(weights)
    assert found.shape == (3, experts.positions if hasattr(experts, "groups") else 1, E, E)
    norm = update(*experts.factors(weights), experts.rank).square().sum((1, 2))
    for order in range(found.shape[1]):
        torch.testing.assert_close(found[:, order].sum((1, 2)), norm, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found, found.mT)
    assert (found.diagonal(dim1=-2, dim2=-1) >= -1e-12).all()


@pytest.mark.parametrize("name", [name for name in KINDS if not (name.endswith("norm") and name.startswith("ent"))])
def test_inner_products_are_those_of_the_matrices(name):
    experts = KINDS[name]()
    weights = drawn(experts)
    wanted = parts(experts, weights).flatten(-2)
    torch.testing.assert_close(experts.contribution(weights), wanted @ wanted.mT, rtol=1e-9, atol=1e-9)


def test_marginals_under_the_norm_keep_the_deviation_of_the_whole():
    experts = KINDS["entangled-2-norm"]()
    weights = drawn(experts)
    whole_down, whole_up = experts.factors(weights)

    def marginals(leaves, width, order, expert):
        mixed = list(mix(tuple(leaves), weights))
        deviation = materialise(mixed).flatten(-2).var(-1, correction=0, keepdim=True).add(1e-5).sqrt()[..., None]
        mixed[order] = weights[:, order, expert, None, None, None] * leaves[order][expert]
        product = materialise(mixed)
        return ((product - product.mean((-2, -1), keepdim=True)) / deviation)[..., :width].sum(1)

    wanted = torch.stack(
        [
            torch.stack(
                [
                    update(marginals(experts.down, D_IN, n, s), whole_up, 2)
                    + update(whole_down, marginals(experts.up, D_OUT, n, s), 2)
                    for s in range(E)
                ],
                1,
            )
            for n in range(2)
        ],
        1,
    ).flatten(-2)
    wanted = wanted / experts.rank
    torch.testing.assert_close(experts.contribution(weights), wanted @ wanted.mT, rtol=1e-9, atol=1e-9)


@every_kind
def test_leaves_in_single_precision_are_multiplied_in_double(make):
    experts = make()
    exact = experts.contribution(drawn(experts))
    single = experts.float().contribution(drawn(experts))
    assert single.dtype == torch.float64
    torch.testing.assert_close(single, exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))
