"""Factors that are sums of tensor products of leaves: A = sum_s w_s [LN](u_s^(1) x ... x u_s^(N)), cut to a width.

Source: Su et al. 2024 (TensorPoly), arXiv 2405.16671. A leaf u^(n) has shape `(terms, rank, radix_n)`; the first leaf
is the slowest index of the product. `materialise` and `build_reference` are the specification; `build` multiplies and
routes in one batched product; `project` and `expand` push tokens through the leaves without ever building a factor.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import layer_norm, pad

EPS = 1e-5
Leaves = Sequence[Float[Tensor, "*choices terms rank _"]]


def ceil_radices(width: int, order: int) -> tuple[int, ...]:
    """The authors': all radices the smallest q with q**order >= width. What exceeds the width is cut."""
    q = max(1, round(width ** (1 / order)))
    while q**order < width:
        q += 1
    while q > 1 and (q - 1) ** order >= width:
        q -= 1
    return (q,) * order


def exact_radices(width: int, order: int) -> tuple[int, ...]:
    """Ascending radices whose product is the width, of the smallest sum: nothing is cut.

    Where every such factorisation is lopsided (a radix beyond twice the authors', as for a prime), the cover of the
    smallest sum, and then of the smallest product, in which every entry of every leaf is read.
    """
    limit = 2 * ceil_radices(width, order)[0]
    exact = [found for found in _factorisations(width, order, 1) if found[-1] <= limit]
    return min(exact or _covers(width, order, 1, limit), key=lambda found: (sum(found), math.prod(found), found))


def dead_entries(width: int, radices: Sequence[int]) -> tuple[int, ...]:
    """For each order position, how many entries of its leaf only reach what the cut throws away."""
    strides = [math.prod(radices[n + 1 :]) for n in range(len(radices))]
    return tuple(max(0, radix - -(-width // stride)) for radix, stride in zip(radices, strides))


def _factorisations(width: int, order: int, least: int) -> Iterator[tuple[int, ...]]:
    if order == 1:
        if width >= least:
            yield (width,)
        return
    first = least
    while first**order <= width:
        if width % first == 0:
            yield from ((first, *rest) for rest in _factorisations(width // first, order - 1, first))
        first += 1


def _covers(width: int, order: int, least: int, limit: int) -> Iterator[tuple[int, ...]]:
    """Ascending radices of product >= width without dead entries."""
    for found in _ascending(width, order, least, limit):
        if not any(dead_entries(width, found)):
            yield found


def _ascending(width: int, order: int, least: int, limit: int) -> Iterator[tuple[int, ...]]:
    if order == 1:
        yield (max(least, width),)
        return
    for first in range(least, limit + 1):
        yield from ((first, *rest) for rest in _ascending(-(-width // first), order - 1, first, limit))
        if first**order >= width:
            return


def materialise(leaves: Leaves, width: int | None = None, norm: bool = False) -> Float[Tensor, "*choices terms rank _"]:
    """Every term's product, as a balanced tree, cut to `width`.

    `norm` is a layer norm without affine over `(rank, product)` of each product of two leaves, before the cut; products
    of more than two leaves are not normalised again.
    """
    return _tree(leaves, norm)[..., :width]


def build_reference(
    leaves: Leaves, weights: Float[Tensor, "choices terms"], width: int, norm: bool = False
) -> Float[Tensor, "choices rank width"]:
    """sum_s w_s [LN](u_s^(1) x ... x u_s^(N)) as it is written."""
    return (weights[..., None, None] * materialise(leaves, width, norm)).sum(-3)


def build(
    leaves: Leaves, weights: Float[Tensor, "choices terms"], width: int, norm: bool = False
) -> Float[Tensor, "choices rank width"]:
    """The same without any term's product: (1|2), (1|2x3) or (1x2|3x4) in one product that sums over the terms."""
    left, right, shift, weights = _halves(leaves, weights, norm)
    if right is None:
        return (weights[..., None, None] * left).sum(-3)[..., :width]
    weighted = (weights[..., None, None] * left).permute(0, 2, 3, 1)
    product = (weighted @ right.transpose(-3, -2)).flatten(-2)
    if shift is not None:
        product = product - shift[..., None]
    return product[..., :width]


def project(
    x: Float[Tensor, "*batch d_in"], leaves: Leaves, weights: Float[Tensor, "*decision terms"], norm: bool = False
) -> Float[Tensor, "*batch rank"]:
    """x A_w by mode products: the right half of the leaves is contracted first. For a token and a choice of its own."""
    left, right, shift, weights = _halves(leaves, weights, norm)
    if right is None:
        padded = pad(x, (0, left.shape[-1] - x.shape[-1]))
        return torch.einsum("...q,...srq,...s->...r", padded, left, weights)
    rows, columns = left.shape[-1], right.shape[-1]
    table = pad(x, (0, rows * columns - x.shape[-1])).unflatten(-1, (rows, columns))
    inner = torch.einsum("...pq,...srq->...srp", table, right)
    hidden = torch.einsum("...srp,...srp,...s->...r", inner, left, weights)
    return hidden if shift is None else hidden - shift * x.sum(-1, keepdim=True)


def expand(
    h: Float[Tensor, "*batch rank"],
    leaves: Leaves,
    weights: Float[Tensor, "*decision terms"],
    width: int,
    norm: bool = False,
) -> Float[Tensor, "*batch d_out"]:
    """h B_w by mode products, the transpose of `project`."""
    left, right, shift, weights = _halves(leaves, weights, norm)
    gated = weights[..., None] * h[..., None, :]
    if right is None:
        return torch.einsum("...sr,...srq->...q", gated, left)[..., :width]
    scaled = gated[..., None] * left
    out = torch.einsum("...srp,...srq->...pq", scaled, right).flatten(-2)[..., :width]
    return out if shift is None else out - shift * h.sum(-1, keepdim=True)


def mix(
    leaves: Sequence[Float[Tensor, "terms groups rank _"]], weights: Float[Tensor, "*choices order terms"]
) -> tuple[Float[Tensor, "*choices groups rank _"], ...]:
    """Order routing: each order position chooses among its own leaves, sum_s w_ns u_s^(n)."""
    return tuple(
        (weights[..., n if weights.shape[-2] > 1 else 0, :] @ leaf.flatten(1)).unflatten(-1, leaf.shape[1:])
        for n, leaf in enumerate(leaves)
    )


def _tree(leaves: Leaves, norm: bool) -> Tensor:
    if len(leaves) == 1:
        return leaves[0]
    middle = len(leaves) // 2
    left, right = _tree(leaves[:middle], norm), _tree(leaves[middle:], norm)
    product = (left[..., :, None] * right[..., None, :]).flatten(-2)
    return layer_norm(product, product.shape[-2:], eps=EPS) if norm and len(leaves) == 2 else product


def _halves(
    leaves: Leaves, weights: Tensor, norm: bool
) -> tuple[Tensor, Tensor | None, Float[Tensor, "*decision 1"] | None, Tensor]:
    """Left and right half, what the norm of their product subtracts from every entry, and the weights it rescales."""
    if len(leaves) == 1:
        return leaves[0], None, None, weights
    middle = len(leaves) // 2
    left, right = _tree(leaves[:middle], norm), _tree(leaves[middle:], norm)
    if not norm or len(leaves) > 2:
        return left, right, None, weights
    mean, deviation = product_moments(left, right)
    weights = weights / deviation
    return left, right, (weights * mean).sum(-1, keepdim=True), weights


def product_moments(
    left: Float[Tensor, "*choices terms rank _"], right: Float[Tensor, "*choices terms rank _"]
) -> tuple[Float[Tensor, "*choices terms"], Float[Tensor, "*choices terms"]]:
    """Mean, and sqrt(variance + eps), over rank and product of each term of `left x right`, in closed form."""
    entries = left.shape[-2] * left.shape[-1] * right.shape[-1]
    mean = (left.sum(-1) * right.sum(-1)).sum(-1) / entries
    square = (left.square().sum(-1) * right.square().sum(-1)).sum(-1) / entries
    return mean, ((square - mean.square()).clamp_min(0) + EPS).sqrt()
