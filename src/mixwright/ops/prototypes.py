"""Class prototypes, and how queries resemble them (Snell et al. 2017; with cosines: Hu et al. 2022)."""

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
