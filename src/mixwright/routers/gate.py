"""Gates of PHATGOOSE (Muqeeth et al. 2024): trained as a sigmoid for one expert, used as a prototype among many."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from mixwright.routers.base import AbstractRouter, AbstractScores
from mixwright.routing import Condition, Routing

EPS = 1e-5


class SigmoidGate(AbstractRouter):
    """w_t = sigmoid(v . u_t) for a single expert (Muqeeth et al. 2024, section 3, eq. 2); v starts at zero."""

    def __init__(self, d_in: int) -> None:
        super().__init__()
        self.num_experts = 1
        self.gate = nn.Parameter(torch.zeros(1, d_in))

    def forward(self, x: Float[Tensor, "*batch d_in"], condition: Condition) -> Routing:
        """One weight in (0, 1) for each token."""
        del condition
        return Routing(torch.sigmoid(linear(x.float(), self.gate.float())), num_experts=1)


def standardise(x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
    """(x - mean) / sqrt(var + 1e-5) over the last axis: population variance, no affine part, in float32 or wider."""
    wide = x if x.dtype == torch.float64 else x.float()
    return layer_norm(wide, wide.shape[-1:], eps=EPS)


class PrototypeScores(AbstractScores):
    """score_z = standardise(v_z) . standardise(u) / sqrt(n) (Muqeeth et al. 2024, section 3, eqs. 3-5)."""

    def __init__(self, prototypes: Float[Tensor, "experts d_in"]) -> None:
        super().__init__()
        self.num_experts = prototypes.shape[0]
        self.register_buffer("prototypes", prototypes.detach())
        self.prototypes: Tensor

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch experts"]:
        """A centred cosine times sqrt(n), for each expert."""
        return linear(standardise(x), standardise(self.prototypes) * self.prototypes.shape[-1] ** -0.5)
