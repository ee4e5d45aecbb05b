"""Ways of normalising queries before they meet the sub-keys, always in float32."""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

QueryNormName = Literal["batch", "past_batch", "layer", "rms", "l2", "none"]


class AbstractQueryNorm(nn.Module, ABC):
    """Normalises queries; `accumulate` is the number of micro-batches of an optimiser step."""

    accumulate: int = 1

    @abstractmethod
    def forward(
        self, queries: Float[Tensor, "tokens heads dim"], counted: Bool[Tensor, " tokens"] | None
    ) -> Float[Tensor, "tokens heads dim"]:
        """The normalised queries; tokens that are not `counted` have no part in any statistic."""


class BatchQueryNorm(AbstractQueryNorm):
    """q <- gamma (q - mean) / sqrt(var + eps) + beta over the tokens of the batch (He 2024, section 3.4).

    In training outputs depend on the other tokens of the batch, later ones included; in eval mode on none.
    """

    def __init__(self, heads: int, dim: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(heads, dim))
        self.bias = nn.Parameter(torch.zeros(heads, dim))
        self.mean: Tensor
        self.var: Tensor
        self.register_buffer("mean", torch.zeros(heads, dim))
        self.register_buffer("var", torch.ones(heads, dim))

    def forward(
        self, queries: Float[Tensor, "tokens heads dim"], counted: Bool[Tensor, " tokens"] | None
    ) -> Float[Tensor, "tokens heads dim"]:
        """Standardised over the counted tokens in training, by the running statistics in eval mode."""
        mean, var = self.mean, self.var
        seen = queries if counted is None else queries[counted]
        if self.training and len(seen) > 1:
            mean, var = seen.mean(0), seen.var(0, unbiased=False)
            with torch.no_grad():
                self.mean.lerp_(mean, self.momentum)
                self.var.lerp_(var * (len(seen) / (len(seen) - 1)), self.momentum)
        return (queries - mean) * (var + self.eps).rsqrt() * self.weight + self.bias


class LayerQueryNorm(AbstractQueryNorm):
    """Layer norm of each head's query."""

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, dim))
        self.bias = nn.Parameter(torch.zeros(heads, dim))

    def forward(
        self, queries: Float[Tensor, "tokens heads dim"], counted: Bool[Tensor, " tokens"] | None
    ) -> Float[Tensor, "tokens heads dim"]:
        """Each query by itself."""
        del counted
        return functional.layer_norm(queries, queries.shape[-1:]) * self.weight + self.bias


class NoQueryNorm(AbstractQueryNorm):
    """Queries as they are."""

    def forward(
        self, queries: Float[Tensor, "tokens heads dim"], counted: Bool[Tensor, " tokens"] | None
    ) -> Float[Tensor, "tokens heads dim"]:
        """The queries."""
        del counted
        return queries


def make_query_norm(name: QueryNormName, heads: int, dim: int) -> AbstractQueryNorm:
    """The query norm of that name. Raises ValueError for a name that is none."""
    if name == "batch":
        return BatchQueryNorm(heads, dim)
    if name == "layer":
        return LayerQueryNorm(heads, dim)
    if name == "none":
        return NoQueryNorm()
    raise ValueError(f"query_norm={name!r}; expected batch, layer or none.")
