"""Inner products of what is never built: of cut tensor products from their leaves, of updates from r x r Grams.

A factor's columns are sums of tensor products, cut to the layer's width. The entries that a cut keeps are a prefix in
row-major order, and a prefix is a disjoint union of at most N boxes, so the Gram of the cut columns is a sum over boxes
of products of small Grams: exact, without a column of full width.
"""

from collections.abc import Iterator, Sequence
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from mixwright.ops.tensor_product import mix, product_moments

Box = tuple[slice, ...]


def boxes(radices: Sequence[int], width: int) -> Iterator[Box]:
    """Disjoint boxes of indices that hold the first `width` entries of a row-major tensor with these sides."""
    if not 0 < width <= prod(radices):
        raise ValueError(f"{tuple(radices)} has {prod(radices)} entries; no {width} of them can be kept.")
    prefix: Box = ()
    for order, radix in enumerate(radices):
        below = prod(radices[order + 1 :])
        whole, width = divmod(width, below)
        rest = tuple(slice(0, side) for side in radices[order + 1 :])
        if whole == radix:
            yield (*prefix, slice(0, radix), *rest)
            return
        if whole:
            yield (*prefix, slice(0, whole), *rest)
        prefix = (*prefix, slice(whole, whole + 1))
        if not width:
            return


def tensor_gram(
    left: Sequence[Float[Tensor, "*#batch groups rank _radix"]],
    right: Sequence[Float[Tensor, "*#batch groups rank _radix"]],
    width: int,
) -> Float[Tensor, "*batch rank rank"]:
    """G_jk = <a_j, b_k> with a_j = cut(sum_g u1_gj x ... x uN_gj) and b_k likewise: O(N^2 (groups rank)^2 radix).

    One tensor for each order position; their leading axes broadcast, so that what does not vary is computed once.
    """
    total: Tensor | None = None
    for box in boxes([leaf.shape[-1] for leaf in left], width):
        found: Tensor | None = None
        for one, other, part in zip(left, right, box, strict=True):
            small = torch.einsum("...gjq,...hkq->...gjhk", one[..., part], other[..., part])
            found = small if found is None else found * small
        total = found if total is None else total + found  # type: ignore[operator]
    assert total is not None
    return total.sum((-4, -2))


def term_grams(
    leaves: Sequence[Float[Tensor, "terms rank _radix"]], width: int, norm: bool = False
) -> Float[Tensor, "terms terms rank rank"]:
    """A_s' A_p of the terms of `tensor_product.build`, before their weights: the same for every choice."""
    plain = _without_norm([leaf[:, None] for leaf in leaves]) if norm else [leaf[:, None] for leaf in leaves]
    return tensor_gram([leaf[:, None] for leaf in plain], [leaf[None] for leaf in plain], width)


def order_grams(
    leaves: Sequence[Float[Tensor, "terms groups rank _radix"]],
    weights: Float[Tensor, "choices order terms"],
    width: int,
    norm: bool = False,
) -> Float[Tensor, "choices order terms terms rank rank"]:
    """A_ns' A_np of the marginals of order routing: A_ns is A with its n-th mixed leaf replaced by w_ns u_s^(n).

    At every order n the marginals sum to A. The norm of a mixture is not linear in it: its mean is taken of each
    marginal and its deviation of the whole, so that they sum to A all the same.
    """
    mixed = [leaf[:, None] for leaf in mix(leaves, weights)]
    found: list[Tensor] = []
    for order, leaf in enumerate(leaves):
        parts = [leaf[None] if place == order else whole for place, whole in enumerate(mixed)]
        plain = _without_norm(parts, mixed) if norm else parts
        gram = tensor_gram([part[:, :, None] for part in plain], [part[:, None] for part in plain], width)
        own = weights[:, order]
        found.append(gram * (own[:, :, None] * own[:, None, :])[..., None, None])
    return torch.stack(found, 1)


def _without_norm(leaves: Sequence[Tensor], whole: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Leaves whose plain products, summed over groups, are the normalised products of these.

    Two leaves get a second group that holds the mean; of three or four, the normalised pairs are leaves themselves.
    `whole`: the leaves whose deviation counts, where they are not the same.
    """
    whole = leaves if whole is None else whole
    leading = torch.broadcast_shapes(*(leaf.shape[:-1] for leaf in leaves))
    leaves = [leaf.expand(*leading, leaf.shape[-1]) for leaf in leaves]
    if len(leaves) == 1:
        return leaves
    if len(leaves) > 2:
        middle = len(leaves) // 2
        halves = ((leaves[:middle], whole[:middle]), (leaves[middle:], whole[middle:]))
        return [part[0] if len(part) == 1 else _normalised_pair(*part, *of) for part, of in halves]
    left, right = leaves
    mean, deviation = product_moments(left, right)[0], product_moments(*whole)[1]
    scaled = left / deviation[..., None, None]
    shift = (-mean / deviation)[..., None, None].expand_as(scaled)
    return [torch.cat([scaled, shift], -3), torch.cat([right, torch.ones_like(right)], -3)]


def _normalised_pair(left: Tensor, right: Tensor, whole_left: Tensor, whole_right: Tensor) -> Tensor:
    mean, deviation = product_moments(left, right)[0], product_moments(whole_left, whole_right)[1]
    product = (left[..., :, None] * right[..., None, :]).flatten(-2)
    return (product - mean[..., None, None]) / deviation[..., None, None]


def update_products(
    down: Float[Tensor, "*batch experts experts rank rank"], up: Float[Tensor, "*batch experts experts rank rank"]
) -> Float[Tensor, "*batch experts experts"]:
    """<D_s, D_p> for the parts D_s = (A_s B + A B_s) / 2r of one update (1/r) A B, where A = sum_s A_s, B = sum_s B_s.

    `down[s, p]` = A_s' A_p and `up[s, p]` = B_s B_p' for parts that hold their routing weights already. The parts sum
    to the update, so the sum of row s is <D_s, update> and the sum of all is the update's squared Frobenius norm.
    """
    beside, above = down.sum(-3), up.sum(-3)  # A_s' A, B_s B'
    whole_down, whole_up = beside.sum(-3), above.sum(-3)
    squares = torch.einsum("...spjk,...jk->...sp", down, whole_up) + torch.einsum(
        "...spjk,...jk->...sp", up, whole_down
    )
    mixed = torch.einsum("...sjk,...pkj->...sp", beside, above)
    return (squares + mixed + mixed.mT) / (4 * down.shape[-1] ** 2)
