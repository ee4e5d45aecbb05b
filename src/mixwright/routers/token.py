"""The router of token-wise methods: score all experts, keep the best k, weigh them by a softmax."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mixwright.ops.top_k import top_k
from mixwright.routers.base import AbstractRouter, AbstractScores
from mixwright.routing import Condition, Routing


class TokenRouter(AbstractRouter):
    """w = softmax over the k largest of score_z(u) + offset_z (Muqeeth et al. 2024, section 3, eq. 6).

    `allowed` (experts,) masks experts out before the choice; `offset` (experts,) is added to the scores. A token for
    which fewer than k experts are allowed gives the rest no weight.
    """

    def __init__(
        self,
        scores: AbstractScores,
        top_k: int,
        *,
        allowed: Bool[Tensor, " experts"] | None = None,
        offset: Float[Tensor, " experts"] | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = scores.num_experts
        if not 1 <= top_k <= self.num_experts:
            raise ValueError(
                f"top_k={top_k}, but the pool has {self.num_experts} experts; choose 1 <= top_k <= {self.num_experts}."
            )
        self.scores = scores
        self.top_k = top_k
        everyone = torch.ones(self.num_experts, dtype=torch.bool)
        self.register_buffer("allowed", everyone if allowed is None else allowed.bool())
        self.register_buffer("offset", offset)
        self.allowed: Tensor
        self.offset: Tensor | None

    def forward(self, x: Float[Tensor, "*batch d_in"], condition: Condition) -> Routing:
        """The k best experts of every token, best first."""
        del condition
        scores = self.scores(x)
        if self.offset is not None:
            scores = scores + self.offset
        return choose(scores.masked_fill(~self.allowed, -torch.inf), self.top_k)


def choose(scores: Float[Tensor, "*batch experts"], k: int) -> Routing:
    """Softmax over the `k` largest scores; a score of -inf gets weight zero, and the id of the winner."""
    values, indices = top_k(scores, k)
    possible = values > -torch.inf
    weights = torch.where(possible, torch.softmax(values, -1), 0.0)
    return Routing(weights, scores.shape[-1], torch.where(possible, indices, indices[..., :1]))
