"""What keeps latent experts from collapsing into one, measured on tables and factors: no expert is ever built.

Each function is a quantity to weigh into a loss. With routing weights w of shape (tasks, ..., experts): rows that are
all alike carry no information about the task, columns that are all alike carry none about the expert.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

FLOOR = 1e-2
"""Below this norm a leaf counts as having no direction yet: leaves that start at zero must not be torn about."""


def entropy(weights: Float[Tensor, "*rows experts"]) -> Float[Tensor, "*rows"]:
    """- sum_s p_s log p_s in nats, of rows scaled to sum to 1; 0 log 0 is 0, and its slope is finite."""
    tiny = torch.finfo(weights.dtype).tiny
    p = weights / weights.sum(-1, keepdim=True).clamp_min(tiny)
    return -(p * p.clamp_min(tiny).log()).sum(-1)


def mutual_information(table: Float[Tensor, "tasks *positions experts"]) -> Float[Tensor, "*positions"]:
    """I(task; expert) = H(mean_t w_t) - mean_t H(w_t) in nats: 0 where all tasks route alike, at most log(experts).

    Usage entropy is high when no expert is forgotten; per-task entropy is low when each task commits itself.
    """
    return entropy(table.mean(0)) - entropy(table).mean(0)


def overlap(leaves: Sequence[Float[Tensor, "experts *columns _"]], floor: float = FLOOR) -> Float[Tensor, ""]:
    """mean_{s,s'} (mean_j prod_n cos(u^n_{s,j}, u^n_{s',j}))^2 - 1/R: 0 for orthogonal experts, 1 - 1/R for equal ones.

    The product of the leaves' cosines is the cosine of the tensors u^1 (x) ... (x) u^N, so nothing is multiplied out.
    A leaf shorter than `floor` counts as that long, and experts that are zero overlap with nobody.
    """
    experts = leaves[0].shape[0]
    product = torch.ones((), dtype=leaves[0].dtype, device=leaves[0].device)
    for leaf in leaves:
        flat = leaf.reshape(experts, -1, leaf.shape[-1])
        unit = flat / torch.linalg.vector_norm(flat, dim=-1, keepdim=True).clamp_min(floor)
        product = product * torch.einsum("a j q, b j q -> j a b", unit, unit)
    cosines = product.mean(0)
    return (cosines - torch.diag(cosines.diagonal())).square().sum() / experts**2


def surplus(logits: Float[Tensor, "*rows experts"]) -> Float[Tensor, ""]:
    """relu(mean sigmoid(z) - 1/R): an L1 penalty on experts in use that leaves one expert for each row free."""
    return torch.relu(torch.sigmoid(logits).mean() - 1.0 / logits.shape[-1])


def indian_buffet(logits: Float[Tensor, "tasks experts"], alpha: float = 1.0) -> Float[Tensor, ""]:
    """- log P(Z | alpha) of the choices Z = round(sigmoid(z)), straight-through: the gradient of what was rounded.

    The Indian buffet process over T tasks (Griffiths and Ghahramani 2005, equation 14; Ponti et al. 2022):
    - [K log alpha - sum_h log K_h! - alpha H_T + sum_k log (T - m_k)! + log (m_k - 1)! - log T!], where K experts are
    used by anybody, m_k is how many tasks use expert k, K_h how many experts share the column h, H_T a harmonic number.
    `alpha` moves the value and not the gradient. An expert that nobody uses is outside the sum and gets no gradient.
    """
    tasks = logits.shape[0]
    scores = torch.sigmoid(logits)
    choices = (scores.round() - scores).detach() + scores
    rounded = scores.detach().round()
    used = rounded.sum(0) > 0
    counts = choices.sum(0)[used]
    columns = rounded.T[used]
    alike = torch.unique(columns, dim=0, return_counts=True)[1] if len(columns) else counts.new_zeros(0)
    harmonic = sum(1.0 / i for i in range(1, tasks + 1))
    total = torch.lgamma(torch.tensor(tasks + 1.0, dtype=counts.dtype, device=counts.device))
    each = torch.lgamma(tasks - counts + 1) + torch.lgamma(counts) - total
    return (
        alpha * harmonic
        - len(columns) * torch.log(torch.tensor(alpha, dtype=counts.dtype, device=counts.device))
        + torch.lgamma(alike.to(counts.dtype) + 1).sum()
        - each.sum()
    )
