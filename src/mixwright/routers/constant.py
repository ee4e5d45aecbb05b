"""The router that asks nobody."""

from jaxtyping import Float
from torch import Tensor

from mixwright.routers.base import AbstractRouter
from mixwright.routing import Condition, Routing


class ConstantRouter(AbstractRouter):
    """The same weight for every expert, always: uniform weights are the merged product (1/E) sum_e B_e A_e."""

    def __init__(self, weights: Float[Tensor, " experts"]) -> None:
        super().__init__()
        self.num_experts = weights.shape[0]
        self.register_buffer("weights", weights.float())
        self.weights: Tensor

    def forward(self, x: Float[Tensor, "*batch d_in"], condition: Condition) -> Routing:
        """One choice for the whole model."""
        del x, condition
        return Routing(self.weights, self.num_experts)
