"""The constraint that experts be sparse, as a term of the loss (sheet a6)."""

from jaxtyping import Float
from torch import Tensor

from mixwright.experts.sparse_deltas import SparseDeltas

REFERENCE_EXPERTS = 8


def sparsity_term(
    deltas: SparseDeltas, weights: Float[Tensor, "episodes experts"], sparsity: float, floor: float
) -> Float[Tensor, ""]:
    """sum_e sum_m b_em lambda_m (q_m - (1 - tau)): masks feel the smooth q_m, multipliers the sparsity that is counted.

    Two functions for one constraint, as Gallego-Posada et al. (2022) have it: the smooth one has gradients, the other
    is what is promised. b_em = (M / 8) ((1 - floor) alpha_em + floor / M): an expert's own share of episode e, never
    less than a floor, and scaled so that the pool meets its constraint as soon with any number of experts M as with
    the paper's 8. The gradient for lambda_m is b_em (tau - sparsity_m): `dual_ascent` goes up it, and restarts at 0.
    While every multiplier is 0 the masks' part is zero, and is not computed.
    """
    count = weights.shape[1]
    counts = (count / REFERENCE_EXPERTS) * ((1 - floor) * weights.detach() + floor / count).sum(0)
    multipliers = deltas.multipliers
    risen = multipliers - multipliers.detach()
    term = (counts * risen * (sparsity - deltas.sparsity())).sum()
    if bool((multipliers == 0).all()):
        return term
    return term + (counts * multipliers.detach() * (deltas.expected_l0() - (1 - sparsity))).sum()
