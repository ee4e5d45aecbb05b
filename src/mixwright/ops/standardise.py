"""Standardising features as PHATGOOSE's router does: a LayerNorm without weights."""

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import layer_norm

EPS = 1e-5


def standardise(x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
    """(x - mean) / sqrt(var + 1e-5) over the last axis: population variance, no affine part, in float32 or wider."""
    wide = x if x.element_size() == 8 else x.float()
    return layer_norm(wide, wide.shape[-1:], eps=EPS)
