"""A term of the loss that pushes experts' masks apart; the paper has none."""

import torch
from jaxtyping import Float
from torch import Tensor

from mixwright.experts.sparse_deltas import SparseDeltas


def diversity_term(deltas: SparseDeltas) -> Float[Tensor, ""]:
    """mean over pairs m < n of max(0, E_j[q_mj q_nj] / (q_m q_n) - 1): what they act together more than by chance.

    q_mj = sigmoid(L_mj - DEAD), the odds that a mask acts where it is drawn, and q_m its mean over all weights, by
    which the sparsity constraint learns. Since it is relative to chance, making all of a mask smaller does not lower
    it: how sparse an expert is stays the constraint's business. Its gradient reaches mask logits only: down where the
    other expert acts more than it does on average, up, dead masks included, where it acts less; none once the two are
    no more alike than chance has it, or they would be pushed on and away from the constraint. 0 for one expert.
    """
    if deltas.num_experts < 2:
        return deltas.multipliers.new_zeros(())
    together, alone = deltas.expected_overlap(), deltas.expected_l0()
    first, second = torch.triu_indices(deltas.num_experts, deltas.num_experts, 1, device=together.device)
    return (together[first, second] / (alone[first] * alone[second]) - 1.0).clamp_min(0.0).mean()
