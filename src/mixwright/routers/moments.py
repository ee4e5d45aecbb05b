"""Means and squared deviations of tokens, pooled over micro-batches and over processes (Chan, Golub, LeVeque 1983)."""

from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, distributed


class Moments(NamedTuple):
    """How many `tokens` `()`, their `mean` and the sum of `squares` of what deviates from it, both `(heads, dim)`."""

    tokens: Tensor
    mean: Tensor
    squares: Tensor

    def variance(self, *, unbiased: bool = False) -> Tensor:
        """Zero for no token."""
        return self.squares / (self.tokens - int(unbiased)).clamp_min(1)


def moments_of(values: Float[Tensor, "tokens heads dim"], counted: Bool[Tensor, " tokens"] | None) -> Moments:
    """Of the `counted` tokens, whatever stands in the others; zeros of no token."""
    if counted is None:
        count = values.new_tensor(float(len(values)))
        mean = values.sum(0) / count.clamp_min(1)
        return Moments(count, mean, (values - mean).square().sum(0))
    real = counted[:, None, None]
    count = counted.sum().to(values.dtype)
    mean = values.masked_fill(~real, 0).sum(0) / count.clamp_min(1)
    return Moments(count, mean, (values - mean).masked_fill(~real, 0).square().sum(0))


def pooled(parts: Moments) -> Moments:
    """One of all parts, which lie along a leading axis; each weighs as many tokens as it counted."""
    count = parts.tokens.sum(0)
    weight = parts.tokens[:, None, None]
    mean = (weight * parts.mean).sum(0) / count.clamp_min(1)
    return Moments(count, mean, (parts.squares + weight * (parts.mean - mean).square()).sum(0))


def merged(one: Moments, other: Moments) -> Moments:
    """Of the tokens of both."""
    return pooled(Moments(*(torch.stack(pair) for pair in zip(one, other, strict=True))))


def over_processes(moments: Moments) -> Moments:
    """Of the tokens of all processes, and differentiable by those of this one: the same wherever tokens lie.

    Every process has to take part, in the backward pass too, also one that has no token.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return moments
    shape = moments.mean.shape
    row = torch.cat([moments.tokens[None], moments.mean.flatten(), moments.squares.flatten()])
    rows = cast(Tensor, _Gathered.apply(row))
    count, mean, squares = rows.split([1, shape.numel(), shape.numel()], 1)
    return pooled(Moments(count[:, 0], mean.reshape(-1, *shape), squares.reshape(-1, *shape)))


class _Gathered(torch.autograd.Function):
    """The rows of all processes; backward sums what all of them ask of this process's row."""

    @staticmethod
    def forward(ctx: Any, row: Tensor) -> Tensor:
        rows = [torch.empty_like(row) for _ in range(distributed.get_world_size())]
        distributed.all_gather(rows, row.contiguous())
        return torch.stack(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous().clone()
        distributed.all_reduce(gradient)
        return gradient[distributed.get_rank()]
