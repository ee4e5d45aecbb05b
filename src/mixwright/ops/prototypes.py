"""Class prototypes, and how queries resemble them (Snell et al. 2017; with cosines: Hu et al. 2022)."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

SCALE = 10.0
"""What cosines are multiplied with before the softmax, as P>M>F and SMAT have it."""


def class_means(
    features: Float[Tensor, "shots width"], labels: Int[Tensor, " shots"], num_classes: int
) -> Float[Tensor, "ways width"]:
    """The mean feature of each class, labels 0 to `num_classes` - 1. A class without any has zeros."""
    sums = features.new_zeros(num_classes, features.shape[1]).index_add(0, labels, features)
    counts = torch.bincount(labels, minlength=num_classes).clamp_min(1)
    return sums / counts[:, None].to(sums.dtype)


def cosine_scores(
    queries: Float[Tensor, "queries width"], prototypes: Float[Tensor, "ways width"], scale: float = SCALE
) -> Float[Tensor, "queries ways"]:
    """scale * cos(query, prototype): logits over the classes, in float32 or wider."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    return scale * normalize(queries.to(wide), dim=-1, eps=1e-8) @ normalize(prototypes.to(wide), dim=-1, eps=1e-8).T


Centre = Literal["mean", "median"]
"""The mean of a class, or its geometric median, which a few wrong labels move little."""


def centres(
    features: Float[Tensor, "shots width"], labels: Int[Tensor, " shots"], num_classes: int, centre: Centre = "mean"
) -> Float[Tensor, "ways width"]:
    """The centre of each class."""
    if centre == "mean":
        return class_means(features, labels, num_classes)
    return geometric_medians(features, labels, num_classes)


def geometric_medians(
    features: Float[Tensor, "shots width"], labels: Int[Tensor, " shots"], num_classes: int, iterations: int = 32
) -> Float[Tensor, "ways width"]:
    """The point of least summed distance to the items of each class (Weiszfeld 1937), begun at the median of each axis.

    A weighted mean of the items; gradients take the weights as constants. Of one or two items, or of equal ones, it is
    the mean.
    """
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    shares = wide.new_ones(len(labels))
    for label in range(num_classes):
        rows = labels == label
        if int(rows.sum()) > 2:
            shares[rows] = _weiszfeld(wide[rows].detach(), iterations)
    return _weighted_means(wide, labels, num_classes, shares).to(features.dtype)


def _weiszfeld(items: Float[Tensor, "items width"], iterations: int) -> Float[Tensor, " items"]:
    """How much each item counts in the geometric median: the inverse of its distance."""
    at, shares = items.quantile(0.5, dim=0), items.new_ones(len(items))
    for _ in range(iterations):
        distances = (items - at).norm(dim=1)
        if not bool(distances.max() > 0):
            break
        shares = 1 / distances.clamp_min(max(1e-3 * float(distances.median()), 1e-12 * float(distances.max())))
        shares = shares / shares.sum()
        at = shares @ items
    return shares


def _weighted_means(features: Tensor, labels: Tensor, num_classes: int, shares: Tensor) -> Tensor:
    sums = features.new_zeros(num_classes, features.shape[1]).index_add(0, labels, shares[:, None] * features)
    totals = features.new_zeros(num_classes).index_add(0, labels, shares)
    return sums / totals.clamp_min(1e-20)[:, None]
