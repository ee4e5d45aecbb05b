"""Ways of normalising queries, and sub-keys, before they meet; always in float32 or wider.

A norm that standardises by statistics has one set for each feature of a head's query, both halves; a norm of the single
query works on its halves, since halves are what meets sub-keys.
"""

from abc import ABC, abstractmethod
from difflib import get_close_matches
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mixwright.routers.base import WideBuffers
from mixwright.routers.moments import Moments, merged, moments_of, over_processes
from mixwright.routers.retriever import runs_again

QueryNormName = Literal["batch", "past_batch", "layer", "rms", "l2", "none"]
KeyNormName = Literal["none", "layer", "rms", "l2"]
EPSILON = 1e-5


class AbstractQueryNorm(nn.Module, ABC):
    """Normalises queries.

    `accumulate`: micro-batches of an optimiser step, over which statistics are pooled. `frozen`: statistics stay as
    they are, and are used in training too.
    """

    accumulate: int = 1
    frozen: bool = False

    @abstractmethod
    def forward(
        self, queries: Float[Tensor, "tokens heads dim"], counted: Bool[Tensor, " tokens"] | None
    ) -> Float[Tensor, "tokens heads dim"]:
        """The normalised queries; tokens that are not `counted` have no part in any statistic."""


class AbstractStandardised(WideBuffers, AbstractQueryNorm):
    """q <- gamma (q - mean) / sqrt(var + eps) + beta, in eval mode by running statistics.

    These are moved once for each optimiser step, by the statistics of all its micro-batches and processes, as one large
    batch would. A checkpointed layer's second forward sees what its first one saw, and is not counted; of several
    forwards before one backward, that holds for the last.
    """

    def __init__(self, heads: int, dim: int, momentum: float = 0.1, eps: float = EPSILON) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(heads, dim))
        self.bias = nn.Parameter(torch.zeros(heads, dim))
        self.mean: Tensor
        self.var: Tensor
        self.steps: Tensor
        self.register_buffer("mean", torch.zeros(heads, dim))
        self.register_buffer("var", torch.ones(heads, dim))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self._pending: tuple[Moments, int] | None = None
        self._before: tuple[Tensor, Tensor] | None = None

    def forward(
        self, queries: Float[Tensor, "tokens heads dim"], counted: Bool[Tensor, " tokens"] | None
    ) -> Float[Tensor, "tokens heads dim"]:
        """Standardised by the running statistics in eval mode, in training as the kind of norm says."""
        mean, var = self.mean, self.var
        if self.training and not self.frozen:
            mean, var = self._in_training(queries, counted)
        mean, var, weight, bias = (t.to(queries.dtype) for t in (mean, var, self.weight, self.bias))
        return (queries - mean) * ((var + self.eps).rsqrt() * weight) + bias

    @abstractmethod
    def _in_training(self, queries: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and variance to standardise by."""

    @abstractmethod
    def _share(self) -> float | Tensor:
        """The share of a step's statistics in the running ones."""

    def _count_in(self, found: Moments) -> tuple[Tensor, Tensor]:
        """The running statistics before this forward, which then counts, unless it runs again."""
        return cast(Any, self)._counted_in(found)  # torch leaves the type of what it disables open

    @torch.compiler.disable  # counts in Python, and knows a backward pass from a forward one
    @torch.no_grad()
    def _counted_in(self, found: Moments) -> tuple[Tensor, Tensor]:
        if runs_again() and self._before is not None:
            return self._before
        self._before = self.mean.clone(), self.var.clone()
        found = Moments(*(t.detach() for t in found))
        if self._pending is not None:
            found = merged(self._pending[0], found)
        done = 1 + (0 if self._pending is None else self._pending[1])
        self._pending = (found, done)
        if done >= self.accumulate:
            self._pending = None
            several = (found.tokens > 1).to(self.mean.dtype)
            share = several * self._share()
            self.mean.lerp_(found.mean.to(self.mean.dtype), share)
            self.var.lerp_(found.variance(unbiased=True).to(self.var.dtype), share)
            self.steps += several.long()
        return self._before


class BatchQueryNorm(AbstractStandardised):
    """Batch norm over the tokens of the batch (He 2024, section 3.4; Lample et al. 2019, section 3.1).

    In training outputs depend on the other tokens of the batch, later ones included; in eval mode on none. Tokens are
    standardised over their own micro-batch, on all processes; a single token by the running statistics, which a
    deviation of zero would only erase.
    """

    def _in_training(self, queries: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
        found = over_processes(moments_of(queries, counted))
        mean, var = self._count_in(found)
        several = found.tokens > 1
        mean, var = mean.to(queries.dtype), var.to(queries.dtype)
        return torch.where(several, found.mean, mean), torch.where(several, found.variance(), var)

    def _share(self) -> float | Tensor:
        return self.momentum


class PastBatchQueryNorm(AbstractStandardised):
    """Standardised by the statistics of earlier steps only, through which no gradient flows: causal in training too.

    The first steps are averaged evenly, until each would have less than `momentum`; before the first, queries pass.
    """

    def _in_training(self, queries: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            found = over_processes(moments_of(queries.detach(), counted))
        return self._count_in(found)

    def _share(self) -> float | Tensor:
        return (1 / (self.steps + 1).to(self.mean.dtype)).clamp_min(self.momentum)


class TokenQueryNorm(AbstractQueryNorm):
    """Every half of every query by itself: layer norm, rms norm, or unit length times one learned factor per head."""

    def __init__(self, kind: Literal["layer", "rms", "l2"], heads: int, dim: int) -> None:
        super().__init__()
        self.kind: Literal["layer", "rms", "l2"] = kind
        size = (dim // 2) ** 0.5 if kind == "l2" else 1.0
        self.weight = nn.Parameter(torch.full((heads, 1 if kind == "l2" else dim), size))
        self.bias = nn.Parameter(torch.zeros(heads, dim)) if kind == "layer" else None

    def forward(
        self, queries: Float[Tensor, "tokens heads dim"], counted: Bool[Tensor, " tokens"] | None
    ) -> Float[Tensor, "tokens heads dim"]:
        """Each query by itself."""
        del counted
        halves = normalised(queries.unflatten(-1, (2, queries.shape[-1] // 2)), self.kind)
        out = halves.flatten(-2) * self.weight.to(queries.dtype)
        return out if self.bias is None else out + self.bias.to(queries.dtype)


class NoQueryNorm(AbstractQueryNorm):
    """Queries as they are."""

    def forward(
        self, queries: Float[Tensor, "tokens heads dim"], counted: Bool[Tensor, " tokens"] | None
    ) -> Float[Tensor, "tokens heads dim"]:
        """The queries."""
        del counted
        return queries


class KeyNorm(nn.Module):
    """Sub-keys of one axis, each by itself; a learned factor per feature starts where lengths are one."""

    def __init__(self, kind: Literal["layer", "rms", "l2"], half: int) -> None:
        super().__init__()
        self.kind: Literal["layer", "rms", "l2"] = kind
        self.weight = None if kind == "l2" else nn.Parameter(torch.full((half,), half**-0.5))

    def forward(self, keys: Float[Tensor, "*keys half"]) -> Float[Tensor, "*keys half"]:
        """The normalised sub-keys."""
        found = normalised(keys, self.kind)
        return found if self.weight is None else found * self.weight.to(found.dtype)


def normalised(
    vectors: Float[Tensor, "*batch half"], kind: Literal["layer", "rms", "l2"]
) -> Float[Tensor, "*batch half"]:
    """Each vector of mean zero and deviation one, of mean square one, or of length one."""
    if kind == "l2":
        return nn.functional.normalize(vectors, dim=-1)
    if kind == "layer":
        return nn.functional.layer_norm(vectors, vectors.shape[-1:])
    return nn.functional.rms_norm(vectors, vectors.shape[-1:], eps=EPSILON)


def make_query_norm(name: QueryNormName, heads: int, dim: int) -> AbstractQueryNorm:
    """The query norm of that name. Raises ValueError for a name that is none."""
    known("query_norm", name, get_args(QueryNormName))
    if name == "batch":
        return BatchQueryNorm(heads, dim)
    if name == "past_batch":
        return PastBatchQueryNorm(heads, dim)
    return NoQueryNorm() if name == "none" else TokenQueryNorm(name, heads, dim)


def make_key_norm(name: KeyNormName, half: int) -> KeyNorm | None:
    """The key norm of that name, for one axis. Raises ValueError for a name that is none."""
    known("key_norm", name, get_args(KeyNormName))
    return None if name == "none" else KeyNorm(name, half)


def known(setting: str, name: object, names: tuple[str, ...]) -> None:
    """Raises ValueError, with the nearest name, unless `name` is among `names`."""
    if name in names:
        return
    near = get_close_matches(name, names, n=1, cutoff=0.4) if isinstance(name, str) else []
    advice = f"did you mean {near[0]!r}?" if near else f"accepted are {', '.join(names)}."
    raise ValueError(f"{setting}={name!r} is unknown; {advice}")
