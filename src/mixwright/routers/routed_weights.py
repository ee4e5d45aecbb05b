"""Mixture weights that depend on the input, which those of the paper don't: static ones can't serve two tasks at once.

What a token knows is the running mean of the components' embeddings over the real tokens up to its own. It is worked
out once in a pass, at the embedding, and kept where caches and beams carry it.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixwright.routers.base import AbstractRouter
from mixwright.routers.mixture_weights import MixtureWeights
from mixwright.routing import Condition, Routing, RoutingMemory

_NAME = "mixture"


class RoutedMixtureWeights(AbstractRouter):
    """alpha_t = softmax((a + S f_t) / tau): S is zero at first, where every bit is that of the static weights.

    f_t = rms_norm(mean over tokens 0..t of sum_m pad(E_m)), m being the components that the embedding allows: `embed`
    gives E_m, in the row of the embedding; a row without it that comes first in a pass takes the stream. `prefix` 0: a
    choice for each token. Otherwise one for each sequence: the mean is of its first `prefix` real tokens, and
    tokens before that many are known have the static weights, so that no token depends on a later one. Not from the
    paper; every row shares f.
    """

    def __init__(self, static: MixtureWeights, width: int, prefix: int = 0) -> None:
        super().__init__()
        self.num_experts = static.num_experts
        self.static = static
        self.prefix = prefix
        self.embed: Callable[[int, Tensor | None], Tensor] | None = None
        self.slope = nn.Parameter(torch.zeros(static.num_experts, width))

    def weights(self) -> Float[Tensor, " models"]:
        """The static part: alpha where the input says nothing."""
        return self.static.weights()

    def set(self, weights: Float[Tensor, " models"]) -> None:
        """These static weights from now on. A component at 0 stays there whatever the input says."""
        self.static.set(weights)

    def forward(self, x: Tensor, condition: Condition) -> Routing:
        """A choice for each token."""
        feature = self._feature(x, condition)
        cpu, ids = self.static.live()
        if len(cpu) == 1:
            return self.static(x, condition)
        if self.static.draw == "dirichlet":
            raise ValueError("draw=dirichlet is for weights that do not depend on the input; use gumbel, or none.")
        with torch.autocast(x.device.type, enabled=False):
            slope = self.slope.to(feature.dtype)[ids]
            logits = self.static.live_logits(condition) + feature[:, -x.shape[1] :] @ slope.T
            weights = self.static.relaxed(logits, condition)
        return Routing(weights, self.num_experts, cpu.expand(weights.shape))

    def settled(self) -> Routing | None:
        """The routing where one component is allowed alone: then the input says nothing."""
        return self.static.settled()

    def _feature(self, x: Tensor, condition: Condition) -> Float[Tensor, "batch seq width"]:
        memory = condition.memory
        if memory is None or not memory.is_open:
            raise ValueError(
                "mixture weights that depend on the input need the memory of a running pass: call the hybrid, not a "
                "slot of it, or give Condition(memory=RoutingMemory())."
            )
        name = f"{_NAME}/{self.prefix}"
        if name not in memory.shared:
            if memory.unseen:
                raise ValueError(
                    f"the cache holds {memory.unseen} tokens that these mixture weights have not seen; give the cache "
                    "that an earlier pass of this model returned, or none."
                )
            seen = self._fitted(x) if self.embed is None else self._embedded(self.embed)
            real = real_tokens(seen, condition)
            memory.shared[name] = stream_mean(memory, memory.visit(name), seen, real, self.prefix)
        return memory.shared[name]

    def _embedded(self, embed: Callable[[int, Tensor | None], Tensor]) -> Tensor:
        return torch.stack([self._fitted(embed(m, None)) for m in self.static.live()[0].tolist()]).sum(0)

    def _fitted(self, x: Tensor) -> Tensor:
        width = self.slope.shape[1]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return nn.functional.pad(wide, (0, width - x.shape[-1])) if x.shape[-1] < width else wide


def stream_mean(
    memory: RoutingMemory,
    name: str,
    x: Float[Tensor, "batch seq width"],
    real: Float[Tensor, "batch seq"],
    prefix: int = 0,
) -> Float[Tensor, "batch seq width"]:
    """rms_norm of the mean over the real tokens up to each token, of at most the first `prefix` of them if that is set.

    Zero where there is none yet, or fewer than `prefix`. Tokens of earlier passes come from `memory` under `name`,
    which is brought up to date.
    """
    earlier = memory.latest(name)
    start = x.new_zeros((x.shape[0], x.shape[2] + 1)) if earlier is None else earlier.to(x.dtype)
    count = start[:, None, -1:] + real.unsqueeze(-1).cumsum(1)
    taken = real.unsqueeze(-1) * (count <= prefix) if prefix else real.unsqueeze(-1)
    sums = torch.cat([start[:, None, :-1], x * taken], 1).cumsum(1)[:, 1:]
    memory.keep(name, torch.cat([sums, count], -1).detach())
    mean = sums / (count.clamp_max(prefix) if prefix else count).clamp_min(1.0)
    known = count >= max(1, prefix)
    return torch.where(known, mean * torch.rsqrt(mean.square().mean(-1, keepdim=True) + 1e-12), 0.0)


def real_tokens(x: Tensor, condition: Condition) -> Float[Tensor, "batch seq"]:
    """1 for real tokens, 0 for padding: a mask's last columns, as it may begin with a cache's."""
    batch, seq = x.shape[:2]
    mask = condition.token_mask
    dtype = torch.promote_types(x.dtype, torch.float32)
    if mask is None or mask.shape[1] < seq:
        return torch.ones((batch, seq), dtype=dtype, device=x.device)
    return mask[:, mask.shape[1] - seq :].to(dtype).expand(batch, seq)
