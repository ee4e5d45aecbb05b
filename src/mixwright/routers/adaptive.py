"""As many experts as it takes to hold a wanted share of the softmax over all of them, exactly."""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixwright.routers.around import AbstractAround
from mixwright.routers.product_key import ProductKeyRouter
from mixwright.routers.retriever import Retrieval, counted_tokens
from mixwright.routing import Condition


class AdaptiveRouter(AbstractAround):
    """The smallest k <= max_k whose coverage reaches `coverage`, for each head: top-p over a million experts, exactly.

    Experts beyond it get weights of exactly zero, so that nobody reads their rows, and the softmax is over those that
    are kept. `coverage` of 1 or more keeps max_k, of 0 one. Raises ValueError for gates other than softmax.
    """

    def __init__(self, router: ProductKeyRouter, coverage: float, max_k: int) -> None:
        super().__init__(router)
        if not 1 <= max_k <= router.num_experts:
            raise ValueError(f"max_k={max_k}: expected 1 to {router.num_experts}, the experts of the grid.")
        if not coverage >= 0:
            raise ValueError(f"coverage={coverage}: expected a share from 0 to 1.")
        if router.extra_slots is not None or router.always is not None:
            raise ValueError(
                "AdaptiveRouter: experts with slots of their own, by growth or because they always act, are not among "
                "the k best that it chooses from; admit them, or retrieve with a fixed k."
            )
        self.coverage: Float[Tensor, ""]
        self.max_k: Int[Tensor, ""]
        self.register_buffer("coverage", torch.tensor(coverage, dtype=torch.float32))
        self.register_buffer("max_k", torch.tensor(max_k))

    def retrieve(
        self, x: Float[Tensor, "*batch d_in"], condition: Condition, *, top_k: int | None = None, detail: bool = False
    ) -> Retrieval:
        """What each head keeps; `top_k` stands in for max_k. Coverage is that of what is kept."""
        del detail  # coverage is what the choice is made by
        found = self.router.find(self.router.asked(x, condition), top_k=top_k or int(self.max_k), detail=True)
        assert found.coverage is not None
        masses = found.scores.detach().double().softmax(-1) * found.coverage[..., None]
        left_out = (masses.cumsum(-1) - masses >= self.coverage) & (self.coverage < 1)
        left_out[..., 0] = False
        gates = found.scores.masked_fill(left_out, -torch.inf).softmax(-1)
        kept = masses.masked_fill(left_out, 0.0).sum(-1).clamp_max(1.0).float()
        found = replace(found, gates=gates, coverage=kept, margin=None)
        return found.counting(counted_tokens(x.shape[:-1], condition))
