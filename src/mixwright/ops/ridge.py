"""Least squares with a ridge, in float64, for maps between activations."""

import torch
from jaxtyping import Float
from torch import Tensor


def ridge(
    x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens d_out"], strength: float
) -> tuple[Float[Tensor, "d_out d_in"], Float[Tensor, " d_out"]]:
    """(W, b) with the least mean |W x + b - y|^2 + strength * s |W|^2, s the mean variance of a channel of `x`.

    The offset is not held back, and `strength` means the same at every scale of `x`. Float64.
    """
    x, y = x.double(), y.double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    gram = x.T @ x
    gram.diagonal().add_(strength * gram.diagonal().mean() + torch.finfo(torch.float64).tiny)
    weight = torch.linalg.solve(gram, x.T @ y).T
    return weight, y_mean - weight @ x_mean


def shared_axes(
    covariance: Float[Tensor, "d_in d_in"], towards: Float[Tensor, "d_out d_in"]
) -> Float[Tensor, "d_out d_in"]:
    """T of orthogonal rows up to a scale, that keeps the most of a vector's variance in d_out numbers (its principal
    components), turned and scaled to be as near to what `towards` makes of it as that allows (Procrustes)."""
    keep = min(towards.shape[0], covariance.shape[0])
    axes = torch.linalg.eigh(covariance).eigenvectors[:, -keep:]
    natural = towards @ covariance @ axes
    left, _, right = torch.linalg.svd(natural, full_matrices=False)
    length = (towards @ covariance @ towards.T).diagonal().sum() / (axes.T @ covariance @ axes).diagonal().sum()
    return length.clamp_min(0).sqrt() * (left @ right) @ axes.T
