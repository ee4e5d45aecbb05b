"""Routers that know when they are unsure, and spend more there.

A head is unsure of a token where its coverage, the share of the softmax over all experts that it retrieved, is below
its threshold. Coverage depends on the size of the scores, so thresholds are quantiles on held-out data, for each head
of each layer; at a threshold of 0 nothing is ever unsure and the router is the plain one, bit for bit.
"""

from abc import abstractmethod
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixwright.routers.around import AbstractAround
from mixwright.routers.product_key import ProductKeyRouter
from mixwright.routers.retriever import Retrieval, counted_tokens
from mixwright.routing import Condition


class AbstractUnsureRouter(AbstractAround):
    """Flags heads whose coverage is below their entry in `thresholds`, and does something about them."""

    def __init__(self, router: ProductKeyRouter, thresholds: Float[Tensor, " heads"]) -> None:
        super().__init__(router)
        if thresholds.shape != (router.heads,):
            raise ValueError(
                f"thresholds of shape {tuple(thresholds.shape)}: expected one for each of the {router.heads} heads."
            )
        self.thresholds: Float[Tensor, " heads"]
        self.register_buffer("thresholds", thresholds.detach().clone().float())

    def retrieve(
        self, x: Float[Tensor, "*batch d_in"], condition: Condition, *, top_k: int | None = None, detail: bool = False
    ) -> Retrieval:
        """As the plain router, `flagged` and helped where a head is unsure. Tokens that are masked out never are."""
        del detail  # coverage is what flags
        queries = self.router.asked(x, condition)
        found = self.router.find(queries, top_k=top_k, detail=True)
        assert found.coverage is not None
        flagged = found.coverage < self.thresholds
        counted = counted_tokens(x.shape[:-1], condition)
        if counted is not None:
            flagged = flagged & counted[..., None]
        return self.helped(queries, replace(found, flagged=flagged)).counting(counted)

    @abstractmethod
    def helped(self, queries: Float[Tensor, "*batch heads 2 half"], found: Retrieval) -> Retrieval:
        """What becomes of `found`, whose `flagged` is set."""


class FlaggingRouter(AbstractUnsureRouter):
    """Only says which heads are unsure: for whoever wants to abstain, or to ask elsewhere."""

    def helped(self, queries: Float[Tensor, "*batch heads 2 half"], found: Retrieval) -> Retrieval:
        """As it is."""
        del queries
        return found


class WideningRouter(AbstractUnsureRouter):
    """Unsure heads retrieve `wider` experts instead of k, with a softmax over these; only their tokens are asked again.

    The other heads keep what they had, beside weights of exactly zero. `coverage` is that after widening.
    """

    def __init__(self, router: ProductKeyRouter, thresholds: Float[Tensor, " heads"], wider: int) -> None:
        super().__init__(router, thresholds)
        if not router.top_k < wider <= router.num_experts:
            raise ValueError(
                f"wider={wider}: expected more than top_k={router.top_k}, and no more than the grid's "
                f"{router.num_experts} experts; 2 to 4 times top_k is usual."
            )
        self.wider: Int[Tensor, ""]
        self.register_buffer("wider", torch.tensor(wider))

    def helped(self, queries: Float[Tensor, "*batch heads 2 half"], found: Retrieval) -> Retrieval:
        """The flagged heads' rows of a second, ragged retrieval in place of their first."""
        assert found.flagged is not None
        tokens = found.flagged.any(-1)
        if not bool(tokens.any()):
            return found
        again = self.router.find(queries[tokens], top_k=int(self.wider), detail=True)
        heads = found.flagged[tokens]
        more = again.indices.shape[-1] - found.indices.shape[-1]
        k = int(self.wider) - more  # what comes after it are slots that growth keeps for new experts

        def room(given: Tensor, fill: Tensor) -> Tensor:
            return torch.cat([given[..., :k], fill.expand(*given.shape[:-1], more), given[..., k:]], -1)

        scores, gates = (
            room(found.scores, found.scores.new_full((), -torch.inf)),
            room(found.gates, found.gates.new_zeros(())),
        )
        indices = room(found.indices, found.indices[..., :1])
        assert found.coverage is not None and again.coverage is not None
        return replace(
            found,
            scores=scores.index_put((found.flagged,), again.scores[heads]),
            gates=gates.index_put((found.flagged,), again.gates[heads]),
            indices=indices.index_put((found.flagged,), again.indices[heads]),
            coverage=found.coverage.index_put((found.flagged,), again.coverage[heads]),
            margin=None,
        )


class LeaningRouter(AbstractUnsureRouter):
    """Where heads are unsure, a dense branch stands in for what they missed: it is the expert after the last.

    Its weight is 1 - coverage, for the flagged heads only, the mean over heads; 0 where none is flagged.
    """

    def __init__(self, router: ProductKeyRouter, thresholds: Float[Tensor, " heads"]) -> None:
        super().__init__(router, thresholds)
        self.register_buffer("leaning", torch.ones((), dtype=torch.bool))  # tells what it is, among stored tensors

    @property
    def num_experts(self) -> int:
        """Experts of the grid, and the branch."""
        return self.router.num_experts + 1

    def helped(self, queries: Float[Tensor, "*batch heads 2 half"], found: Retrieval) -> Retrieval:
        """With the weight of the dense branch."""
        del queries
        assert found.coverage is not None and found.flagged is not None
        return replace(found, dense=((1 - found.coverage) * found.flagged).mean(-1))
