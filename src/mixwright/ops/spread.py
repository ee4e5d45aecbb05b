"""How unevenly a load is spread over experts, sub-keys, or anything else that is counted."""

import math

import torch
from jaxtyping import Float, Real
from torch import Tensor


def unevenness(load: Real[Tensor, "*batch experts"]) -> Float[Tensor, "*batch"]:
    """log N + sum z log z of the shares z, in nats (He 2024, section 3.3): 0 for equal loads, log N for one alone.

    It is the divergence of the shares from uniform ones. 0 too where nothing was counted.
    """
    wide = load.double()
    total = wide.sum(-1, keepdim=True)
    shares = wide / total.clamp_min(torch.finfo(torch.float64).tiny)
    found = math.log(max(load.shape[-1], 1)) - torch.special.entr(shares).sum(-1)
    return found.clamp_min(0.0).where(total[..., 0] > 0, torch.zeros_like(found))


def gini(load: Real[Tensor, "*batch experts"]) -> Float[Tensor, "*batch"]:
    """Gini's coefficient: mean difference of two loads over twice the mean; 0 for equal ones, 1 - 1/N for one alone."""
    ordered = load.double().sort(-1).values
    count = load.shape[-1]
    rank = torch.arange(1, count + 1, dtype=torch.float64, device=load.device)
    total = ordered.sum(-1)
    found = (2 * rank - count - 1).mul(ordered).sum(-1) / (count * total).clamp_min(torch.finfo(torch.float64).tiny)
    return found.where(total > 0, torch.zeros_like(found))
