"""Affine maps between the hybrid's stream and the widths of its components."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear, pad

Projection = Literal["linear", "identity", "least_squares", "mlp", "none"]
"""`linear`: affine with the framework's initial values (the paper). `identity`: affine, started at the identity with
zeros for missing channels. `least_squares`: the same, to be fitted to activations. `mlp`: two layers with GELU between.
`none`: only padding and truncation."""


class Affine(nn.Linear):
    """W x + b in the dtype of x, whatever dtype its parameters are kept in."""

    def forward(self, input: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """As nn.Linear's."""
        return linear(input, self.weight.to(input.dtype), self.bias.to(input.dtype))


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
        return nn.Sequential(Affine(d_in, d_out), nn.GELU(), Affine(d_out, d_out))
    made = Affine(d_in, d_out)
    if kind != "linear":
        with torch.no_grad():
            made.weight.copy_(torch.eye(d_out, d_in))
            made.bias.zero_()
    return made
