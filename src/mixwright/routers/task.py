"""Routing by task: one row of weights for each task."""

from jaxtyping import Float
from torch import Tensor

from mixwright.routers.base import AbstractRouter
from mixwright.routing import Condition, Routing


class TaskRouter(AbstractRouter):
    """w = table[task]: one-hot rows make an oracle, or a retrieval's answer."""

    def __init__(self, table: Float[Tensor, "tasks experts"]) -> None:
        super().__init__()
        self.num_experts = table.shape[1]
        self.register_buffer("table", table.float())
        self.table: Tensor

    def forward(self, x: Float[Tensor, "*batch d_in"], condition: Condition) -> Routing:
        """One choice for each row of the batch, `(batch, 1, experts)`, or `(batch, experts)` for inputs of two axes."""
        if condition.task_ids is None:
            raise ValueError("a task router needs condition.task_ids, one id for each row of the batch.")
        weights = self.table[condition.task_ids]
        return Routing(weights.reshape(len(weights), *[1] * (x.dim() - 2), -1), self.num_experts)
