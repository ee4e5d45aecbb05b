"""Inner products without the factors, against the factors themselves: every cut, every order, in double precision."""

from functools import reduce
from itertools import product
from math import prod

import pytest
import torch
from torch import Tensor

from mixwright.ops.tensor_gram import boxes, tensor_gram, update_products


def leaves(*shape: int, radices: tuple[int, ...], seed: int) -> list[Tensor]:
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, radix, generator=made, dtype=torch.float64) for radix in radices]


def columns(factors: list[Tensor], width: int) -> Tensor:
    """(..., rank, width): the plain outer products, summed over groups."""
    outer = reduce(lambda one, other: (one[..., :, None] * other[..., None, :]).flatten(-2), factors)
    return outer[..., :width].sum(-3)


@pytest.mark.parametrize("radices", [(7,), (3, 4), (2, 3, 4), (2, 3, 2, 3)])
def test_boxes_hold_every_kept_index_once(radices: tuple[int, ...]) -> None:
    for width in range(1, prod(radices) + 1):
        found = [index for box in boxes(radices, width) for index in product(*(range(s.start, s.stop) for s in box))]
        assert sorted(found) == list(product(*map(range, radices)))[:width]
        assert len(list(boxes(radices, width))) <= len(radices)


@pytest.mark.parametrize("width", [0, -1, 13])
def test_boxes_refuse_what_cannot_be_kept(width: int) -> None:
    with pytest.raises(ValueError, match="12 entries"):
        list(boxes((3, 4), width))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("radices", "width"), [((5,), 5), ((4, 4), 13), ((4, 4), 16), ((3, 3, 3), 20), ((2,) * 4, 11)])
def test_the_gram_is_that_of_the_cut_columns(radices: tuple[int, ...], width: int, groups: int) -> None:
    one, other = (leaves(2, groups, 3, radices=radices, seed=seed) for seed in (0, 1))
    wanted = torch.einsum("bjd,bkd->bjk", columns(one, width), columns(other, width))
    torch.testing.assert_close(tensor_gram(one, other, width), wanted, rtol=1e-12, atol=1e-12)


def test_what_does_not_vary_broadcasts() -> None:
    one, other = leaves(4, 1, 2, 3, radices=(4, 3), seed=0), leaves(1, 5, 2, 3, radices=(4, 3), seed=1)
    one[1] = one[1][:1]
    wanted = torch.einsum("ajd,bkd->abjk", columns(one, 10)[:, 0], columns(other, 10)[0])
    torch.testing.assert_close(tensor_gram(one, other, 10), wanted, rtol=1e-12, atol=1e-12)


def test_products_of_parts_are_those_of_the_materialised_updates() -> None:
    made = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 4, 3, 9, generator=made).double(), torch.randn(2, 4, 3, 7, generator=made).double()
    whole_down, whole_up = down.sum(1, keepdim=True), up.sum(1, keepdim=True)
    parts = (down.mT @ whole_up + whole_down.mT @ up) / (2 * 3)
    update = whole_down.mT @ whole_up / 3
    torch.testing.assert_close(parts.sum(1), update[:, 0], rtol=1e-12, atol=1e-12)
    found = update_products(torch.einsum("bsjd,bpkd->bspjk", down, down), torch.einsum("bsjd,bpkd->bspjk", up, up))
    torch.testing.assert_close(found, torch.einsum("bsio,bpio->bsp", parts, parts), rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(found.sum((1, 2)), update.square().sum((1, 2, 3)), rtol=1e-12, atol=1e-10)
