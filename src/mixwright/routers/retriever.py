"""What retrieval routers have in common: what a head finds, the routing that it becomes, and who watches."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mixwright.routers.base import AbstractRouter
from mixwright.routing import Condition, Routing


@dataclass(frozen=True, slots=True)
class Retrieval:
    """What each head found, `(*batch, heads, k)`, the best first; the measures, `(*batch, heads)`, on request.

    `coverage`: the share of the softmax over all experts that was retrieved. `entropy`: of that softmax, in nats.
    `margin`: the last retrieved score less the best one that was left. Where a fallback stands by: `flagged`, the heads
    that were unsure, and `dense` `(*batch)`, the weight of a dense branch, which is the expert after the last.
    """

    scores: Float[Tensor, "*batch heads k"]
    gates: Float[Tensor, "*batch heads k"]
    indices: Int[Tensor, "*batch heads k"]
    coverage: Float[Tensor, "*batch heads"] | None = None
    entropy: Float[Tensor, "*batch heads"] | None = None
    margin: Float[Tensor, "*batch heads"] | None = None
    flagged: Bool[Tensor, "*batch heads"] | None = None
    dense: Float[Tensor, "*batch"] | None = None

    def counting(self, counted: Bool[Tensor, "*batch"] | None) -> "Retrieval":
        """The same with gates of zero for tokens that are not `counted`."""
        if counted is None:
            return self
        dense = None if self.dense is None else self.dense * counted
        return replace(self, gates=self.gates * counted[..., None, None], dense=dense)

    def routing(self, num_experts: int) -> Routing:
        """The heads side by side, since heads are summed, and the dense branch after them."""
        weights, indices = self.gates.flatten(-2), self.indices.flatten(-2)
        if self.dense is not None:
            last = indices.new_full((*indices.shape[:-1], 1), num_experts - 1)
            weights, indices = torch.cat([weights, self.dense[..., None]], -1), torch.cat([indices, last], -1)
        return Routing(weights, num_experts, indices)


class Observer(Protocol):
    """Sees every retrieval of a router that it is attached to, once for each forward pass."""

    detail: bool
    """Whether it wants coverage, entropy and margin."""

    def __call__(self, found: Retrieval, counted: Bool[Tensor, "*batch"] | None) -> None:
        """`counted`: the real tokens; None where all are."""
        ...


class AbstractRetriever(AbstractRouter):
    """A router whose heads each retrieve experts from a `grid`; `observers` see what was found."""

    grid: tuple[int, int]
    heads: int

    def __init__(self) -> None:
        super().__init__()
        self.observers: list[Observer] = []

    @abstractmethod
    def retrieve(
        self, x: Float[Tensor, "*batch d_in"], condition: Condition, *, top_k: int | None = None, detail: bool = False
    ) -> Retrieval:
        """What each head finds; with `detail` the measures too. Tokens that are masked out get gates of zero."""

    def forward(self, x: Float[Tensor, "*batch d_in"], condition: Condition) -> Routing:
        """The heads side by side: k is heads * top_k, since heads are summed."""
        found = self.retrieve(x, condition, detail=any(observer.detail for observer in self.observers))
        if self.observers and not runs_again():
            counted = counted_tokens(x.shape[:-1], condition)
            for observer in self.observers:
                observer(found, counted)
        return found.routing(self.num_experts)


def counted_tokens(shape: torch.Size, condition: Condition) -> Bool[Tensor, "*batch"] | None:
    """Which tokens are real; with a cache the mask begins with the tokens of earlier passes."""
    mask = condition.token_mask
    if mask is None or len(shape) != 2 or mask.shape[0] != shape[0] or mask.shape[1] < shape[1]:
        return None
    return mask[:, mask.shape[1] - shape[1] :]


def runs_again() -> bool:
    """Whether this is a checkpointed layer's second forward, inside a backward pass."""
    return torch._C._current_graph_task_id() != -1  # pyright: ignore[reportPrivateUsage]  (torch has no public word)
