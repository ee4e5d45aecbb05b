"""Mixture weights of a hybrid's slot: one for each component, learned or set."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixwright.routers.base import AbstractRouter
from mixwright.routing import Condition, Routing


class MixtureWeights(AbstractRouter):
    """alpha = softmax(a) over the components that are allowed; the others have exactly 0, and one alone exactly 1."""

    def __init__(self, num_models: int) -> None:
        super().__init__()
        self.num_experts = num_models
        self.logits = nn.Parameter(torch.zeros(num_models))
        self.register_buffer("allowed", torch.ones(num_models, dtype=torch.bool))
        self.allowed: Tensor

    def weights(self) -> Float[Tensor, " models"]:
        """alpha, float32."""
        return self.logits.float().masked_fill(~self.allowed, -torch.inf).softmax(-1)

    @torch.no_grad()
    def set(self, weights: Float[Tensor, " models"]) -> None:
        """These weights from now on; zeros are exact. Raises ValueError for what is no point of the simplex."""
        given = weights.detach().double().cpu()
        if given.shape != (self.num_experts,) or not bool((given >= 0).all()) or abs(float(given.sum()) - 1) > 1e-4:
            raise ValueError(
                f"mixture weights {given.tolist()}: expected {self.num_experts} numbers of at least 0 that sum to 1."
            )
        self.allowed.copy_(given > 0)
        self.logits.copy_(given.clamp_min(1e-30).log().masked_fill(given == 0, 0.0))

    def forward(self, x: Float[Tensor, "*batch d_in"], condition: Condition) -> Routing:
        """One choice for the whole model."""
        del x, condition
        members = self.allowed.nonzero().flatten().cpu()
        if len(members) == self.num_experts:
            return Routing(self.weights(), self.num_experts)
        return Routing(self.weights()[members.to(self.logits.device)], self.num_experts, members)
