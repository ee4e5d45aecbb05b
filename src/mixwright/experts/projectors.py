"""Affine maps between the hybrid's stream and the widths of its components."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

Projection = Literal["linear", "identity", "least_squares", "mlp", "none"]


def resized(x: Float[Tensor, "*batch d_in"], width: int) -> Float[Tensor, "*batch d_out"]:
    """The first `width` channels of `x`, or `x` with zeros behind it; `x` itself where it has that width."""
    if x.shape[-1] == width:
        return x
    return x[..., :width] if x.shape[-1] > width else pad(x, (0, width - x.shape[-1]))


def make_projector(kind: Projection, d_in: int, d_out: int) -> nn.Module | None:
    """A projector from width `d_in` to `d_out`; None where the stream is only padded or truncated."""
    if kind == "none":
        return None
    if kind == "mlp":
        return nn.Sequential(nn.Linear(d_in, d_out), nn.GELU(), nn.Linear(d_out, d_out))
    linear = nn.Linear(d_in, d_out)
    if kind != "linear":
        with torch.no_grad():
            linear.weight.copy_(torch.eye(d_out, d_in))
            linear.bias.zero_()
    return linear
