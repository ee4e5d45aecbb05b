"""What a token's router is told of other sites and other tokens: running means of probabilities, as log priors.

Not from the PHATGOOSE paper. Its decisions are made site by site and token by token, and where experts exclude each
other many independent decisions multiply into failure; these terms share them, in one pass and without a parameter.
"""

from bisect import bisect_left

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mixwright.routing import RoutingMemory

_SMALLEST = torch.finfo(torch.float32).tiny


def running_mean(
    memory: RoutingMemory, stream: str, shape: tuple[int, ...], allowed: Bool[Tensor, " experts"]
) -> Float[Tensor, "*batch experts"] | None:
    """The mean of the probabilities that each token of `stream` got at this pass's earlier sites; None at the first.

    Over the sites at which the expert could be chosen; an expert that could not be at any counts as uniform.
    """
    state = memory.depth.get((stream, shape))
    if state is None:
        return None
    total, seen = state
    return torch.where(seen > 0, total / seen.clamp_min(1.0), 1.0 / allowed.sum().clamp_min(1))


def remember(
    memory: RoutingMemory, stream: str, logits: Float[Tensor, "*batch experts"], allowed: Bool[Tensor, " experts"]
) -> None:
    """Add the softmax over all experts, before the choice of k, to what later sites of `stream` see."""
    probabilities = torch.softmax(logits.clamp_min(torch.finfo(logits.dtype).min), -1) * allowed
    key = (stream, tuple(logits.shape[:-1]))
    total, seen = memory.depth.get(key, (0.0, 0.0))
    memory.depth[key] = (total + probabilities, seen + allowed.to(probabilities.dtype))


def log_prior(mean: Float[Tensor, "*batch experts"]) -> Float[Tensor, "*batch experts"]:
    """log(mean), finite for a probability of zero."""
    return mean.clamp_min(_SMALLEST).log()


def causal_mean(
    memory: RoutingMemory,
    name: str,
    view: Float[Tensor, "batch seq experts"],
    real: Float[Tensor, "batch seq"],
    source: Float[Tensor, "batch width"] | None,
) -> tuple[Float[Tensor, "batch seq experts"], Bool[Tensor, "batch seq 1"]]:
    """The mean of `view` over the real tokens before each token, and whether there was one.

    Tokens of earlier passes come from `memory` under `name`, which is brought up to date; an encoder's tokens, as sums
    and a count in `source`, precede all.
    """
    counted = torch.cat([view * real.unsqueeze(-1), real.unsqueeze(-1)], -1)
    earlier = memory.latest(name)
    start = (torch.zeros_like(counted[:, 0]) if earlier is None else earlier).unsqueeze(1)
    # added up from the start, never subtracted: the smallest probabilities keep their digits for the logarithm
    sums = torch.cat([start, counted], 1).cumsum(1)
    memory.keep(name, sums[:, 1:])
    before = sums[:, :-1] if source is None else sums[:, :-1] + source.unsqueeze(1)
    count = before[..., -1:]
    return before[..., :-1] / count.clamp_min(1.0), count > 0.5


def whole_mean(
    view: Float[Tensor, "batch seq experts"], real: Float[Tensor, "batch seq"]
) -> Float[Tensor, "batch 1 experts"]:
    """The mean of `view` over all real tokens of a sequence."""
    weights = real.unsqueeze(-1)
    return (view * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp_min(1.0)


def tell_decoder(
    memory: RoutingMemory, order: int, view: Float[Tensor, "batch seq experts"], real: Float[Tensor, "batch seq"]
) -> None:
    """Leave the sum of an encoder's consensus, as it stands after the cross-attention site `order`, and its count."""
    weights = real.unsqueeze(-1)
    memory.sources[order] = torch.cat([(view * weights).sum(1), weights.sum(1)], -1)


def told_by_encoder(memory: RoutingMemory, order: int) -> Float[Tensor, "batch width"] | None:
    """What the last cross-attention site before `order` left, in this pass or in the one that filled the cache."""
    orders = sorted(memory.sources)
    place = bisect_left(orders, order)
    return memory.sources[orders[place - 1]] if place else None
