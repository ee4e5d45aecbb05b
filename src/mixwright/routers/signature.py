"""Signatures: what an expert's owner says about the expert's text, as statistics, so that others can route to it.

A signature is made of means and variances of the backbone's own activations at one site, and leaves its owner instead
of the data: `mean` (d_in,), `variance` (d_in,), `count` () in real tokens, and, unless the owner declined, `factor`
(rank, d_in), the strongest directions of the covariance, each times its standard deviation. Whoever composes a pool
makes gates out of the signatures with a few matrix products; there is no gradient step anywhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import linear

from mixwright.ops.low_rank import solve_shifted
from mixwright.routers.base import AbstractScores

Signature = Mapping[str, Tensor]
SHRINKAGE = 0.1


@dataclass(frozen=True, slots=True)
class SharedCovariance:
    """Sigma = diag(diagonal) + factor^T factor: the mean of the experts' covariances, shrunk towards its diagonal.

    `diagonal` (d_in,), `factor` (rank, d_in) or None. The experts weigh the same, however much text each has.
    """

    diagonal: Float[Tensor, " d_in"]
    factor: Float[Tensor, "rank d_in"] | None

    def whiten(self, rows: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """rows Sigma^-1."""
        return solve_shifted(self.diagonal, self.factor, rows)


def shared_covariance(signatures: Sequence[Signature | None], shrinkage: float = SHRINKAGE) -> SharedCovariance:
    """mean_z Sigma_z, its covariances between features scaled by 1 - a, a = `shrinkage`; variances as they are.

    An expert with a `factor` contributes factor^T factor plus what is left of its variances on the diagonal; one
    without contributes its variances alone. Shrinking towards the diagonal, not towards a sphere, keeps a few features
    of huge variance, which language models have, from drowning all others. A feature that hardly varies counts as one
    that varies a thousandth of the median.
    """
    if not 0.0 <= shrinkage <= 1.0:
        raise ValueError(f"shrinkage={shrinkage}; accepted is a share from 0 (as measured) to 1 (the diagonal alone).")
    present = _present(signatures)
    variance = torch.stack([signature["variance"].double() for signature in present]).mean(0)
    floor = 1e-3 * variance.median() + torch.finfo(torch.float32).tiny
    factors = [signature["factor"].double() for signature in present if "factor" in signature]
    if not factors or shrinkage == 1.0:
        return SharedCovariance(variance.clamp_min(floor), None)
    factor = torch.cat(factors) * ((1 - shrinkage) / len(present)) ** 0.5
    return SharedCovariance((variance - (factor**2).sum(0)).clamp_min(floor), factor)


class SignatureScores(AbstractScores):
    """score_z = (w_z . u + b_z) / T, w_z = Sigma^-1 (mu_z - mu), b_z = -w_z . (mu_z + mu) / 2: Fisher's discriminant.

    The linear discriminant of Gaussians with one covariance (Hastie et al. 2009, eq. 4.10) with equal priors. `mu` is
    the mean of the pool's means; subtracting it changes every score of a token alike, so no routing among experts,
    and makes zero mean something: the token is as likely under the pool's centre as under the expert. That is where a
    null expert stands. T, `temperature`, is 1 for the discriminant itself.
    """

    def __init__(
        self, weight: Float[Tensor, "experts d_in"], bias: Float[Tensor, " experts"], temperature: float = 1.0
    ) -> None:
        super().__init__()
        self.num_experts = weight.shape[0]
        self.register_buffer("weight", (weight.detach() / temperature).float())
        self.register_buffer("bias", (bias.detach() / temperature).float())
        self.weight: Tensor
        self.bias: Tensor

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch experts"]:
        """The log likelihood of each expert's text against the pool's centre, for each token."""
        with torch.autocast(x.device.type, enabled=False):
            return linear(x.float(), self.weight, self.bias)

    @classmethod
    def from_signatures(
        cls, signatures: Sequence[Signature | None], *, shrinkage: float = SHRINKAGE, temperature: float | None = None
    ) -> "SignatureScores":
        """From one signature for each expert; None, for one without, scores 0 and has to be masked by the router.

        Computed in float64. `shrinkage` as in `shared_covariance`. `temperature` None is 3 where every signature has a
        `factor`, and 10 otherwise: activations are no Gaussians, the discriminant is too sure of itself, and these
        made its probabilities most honest at real widths (benchmarks/signatures.py; 1 is the discriminant itself, by
        which one expert nearly always takes all). Raises ValueError where all are None.
        """
        if temperature is None:
            temperature = 3.0 if all("factor" in signature for signature in _present(signatures)) else 10.0
        if temperature <= 0.0:
            raise ValueError(f"temperature={temperature}; accepted is a number above 0, 1 for the plain discriminant.")
        covariance = shared_covariance(signatures, shrinkage)
        means = torch.stack([signature["mean"].double() for signature in _present(signatures)])
        centre = means.mean(0)
        weight = covariance.whiten(means - centre)
        bias = -0.5 * (weight * (means + centre)).sum(-1)
        rows = torch.tensor([signature is not None for signature in signatures], device=means.device)
        all_weight = means.new_zeros((len(signatures), means.shape[1]))
        all_bias = means.new_zeros(len(signatures))
        all_weight[rows], all_bias[rows] = weight, bias
        return cls(all_weight, all_bias, temperature)


def redundancy(signatures: Sequence[Signature], shrinkage: float = SHRINKAGE) -> Float[Tensor, "experts experts"]:
    """Bhattacharyya coefficient exp(-D^2 / 8) of each pair, D the Mahalanobis distance of the means under Sigma.

    1 for two experts of the same text, near 0 for experts that are told apart at a glance.
    """
    means = torch.stack([signature["mean"].double() for signature in signatures])
    between = means[:, None] - means[None]
    squared = (between * shared_covariance(signatures, shrinkage).whiten(between)).sum(-1)
    return torch.exp(-squared.clamp_min(0.0) / 8).float()


def out_of_pool(
    x: Float[Tensor, "*batch d_in"], signatures: Sequence[Signature], shrinkage: float = SHRINKAGE
) -> Float[Tensor, "*batch"]:
    """min_z (u - mu_z) Sigma^-1 (u - mu_z) / n for each token: about 1 on the pool's own text, larger elsewhere.

    n is d_in, the expected value of a Gaussian's squared Mahalanobis distance.
    """
    covariance = shared_covariance(signatures, shrinkage)
    means = torch.stack([signature["mean"].double() for signature in signatures])
    centre = means.mean(0)
    wide, moved = x.double() - centre, means - centre
    whitened = covariance.whiten(moved)
    # (u - m) S (u - m) = u S u - 2 u S m + m S m: one product for all experts, no (tokens, experts, d_in) tensor
    own = (wide * covariance.whiten(wide)).sum(-1, keepdim=True)
    squared = own - 2 * wide @ whitened.T + (moved * whitened).sum(-1)
    return (squared.amin(-1).clamp_min(0.0) / x.shape[-1]).float()


def out_of_pool_sequence(
    x: Float[Tensor, "batch seq d_in"],
    signatures: Sequence[Signature],
    token_mask: Bool[Tensor, "batch seq"] | None = None,
    shrinkage: float = SHRINKAGE,
) -> Float[Tensor, " batch"]:
    """The mean of `out_of_pool` over each sequence's real tokens."""
    each = out_of_pool(x, signatures, shrinkage)
    real = torch.ones_like(each) if token_mask is None else token_mask.to(each.dtype)
    return (each * real).sum(-1) / real.sum(-1).clamp_min(1.0)


def _present(signatures: Sequence[Signature | None]) -> list[Signature]:
    present = [signature for signature in signatures if signature is not None]
    if not present:
        raise ValueError("no expert of the pool has a signature at this site; collect some, or route by gates.")
    return present
