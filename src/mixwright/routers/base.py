"""What every router, and every way of scoring experts, promises."""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn

from mixwright.routing import Condition, Routing


class AbstractRouter(nn.Module, ABC):
    """Maps a hidden state and what the caller knows to a `Routing` among `num_experts` experts."""

    num_experts: int

    @abstractmethod
    def forward(self, x: Float[Tensor, "*batch d_in"], condition: Condition) -> Routing:
        """The routing of this pass; its decision axes broadcast against those of `x`."""


class AbstractScores(nn.Module, ABC):
    """Scores every expert for every token: higher is better, before any normalising. Always float32."""

    num_experts: int

    @abstractmethod
    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch experts"]:
        """One score for each expert."""
