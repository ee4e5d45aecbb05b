"""Balance without a loss: a selection bias for every sub-key that rises where it is used too little.

Biases count for the choice only and never for a gate (Wang et al. 2024, "Auxiliary-loss-free load balancing", arXiv
2408.15664, with sub-keys for experts). A step changes what later passes choose: what was computed before it stands.
"""

from collections.abc import Generator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from jaxtyping import Bool
from torch import Tensor, nn

from mixwright.evaluation.neuron_sites import neuron_sites, plain_router
from mixwright.routers.product_key import ProductKeyRouter
from mixwright.routers.retriever import Retrieval


class KeyLoads:
    """How often each sub-key of a router was used since the last `clear`; (key heads, sub-keys) for each axis."""

    detail = False

    def __init__(self, router: ProductKeyRouter) -> None:
        self.first = torch.zeros_like(router.bias_first, dtype=torch.int64)
        self.second = torch.zeros_like(router.bias_second, dtype=torch.int64)

    def __call__(self, found: Retrieval, counted: Bool[Tensor, "*batch"] | None) -> None:
        """Add one pass; padding has gates of zero."""
        del counted
        acts = found.gates != 0
        ids, head = found.indices[acts], acts.nonzero()[:, -2]
        n1, n2 = self.first.shape[1], self.second.shape[1]
        head = head if len(self.first) > 1 else torch.zeros_like(head)
        one = torch.ones_like(ids)
        ids = ids % (n1 * n2)  # heads with experts of their own have ids of their own
        self.first.view(-1).index_add_(0, head * n1 + ids // n2, one)
        self.second.view(-1).index_add_(0, head * n2 + ids % n2, one)

    def clear(self) -> None:
        """Nothing seen yet."""
        self.first.zero_()
        self.second.zero_()


class Rebalancer:
    """b_i <- b_i + rate * sign(mean load - load_i), for the sub-keys of each axis, by the passes since the last step.

    `rate` is in units of scores, whose spread is about 1 at the start. Sub-keys that are kept out by a bias of -inf
    stay out. Where several processes run, each sees the load of all.
    """

    def __init__(self, model: nn.Module, rate: float = 0.01) -> None:
        if not rate > 0:
            raise ValueError(f"rate={rate}: expected a step of the biases above 0, such as 0.01.")
        self.rate = rate
        self._sites = neuron_sites(model)
        self.loads = {name: KeyLoads(plain_router(site.router)) for name, site in self._sites.items()}
        for name, site in self._sites.items():
            site.router.observers.append(self.loads[name])

    @torch.no_grad()
    def step(self) -> None:
        """Move the biases by what was used, and begin to count anew. To be called after the optimiser's step."""
        for name, site in self._sites.items():
            router, loads = plain_router(site.router), self.loads[name]
            for bias, load in ((router.bias_first, loads.first), (router.bias_second, loads.second)):
                if dist.is_available() and dist.is_initialized():
                    dist.all_reduce(load)
                _move(bias, load.double(), self.rate)
            loads.clear()

    def detach(self) -> None:
        """Stop counting; the biases stay as they are."""
        for name, site in self._sites.items():
            site.router.observers = [other for other in site.router.observers if other is not self.loads[name]]


def _move(bias: Tensor, load: Tensor, rate: float) -> None:
    """In place; the mean of a head's biases stays 0, since only differences count."""
    open_keys = bias != -torch.inf
    count = open_keys.sum(-1, keepdim=True).clamp_min(1)
    mean = (load * open_keys).sum(-1, keepdim=True) / count
    moved = bias + rate * (mean - load).sign().to(bias.dtype)
    centre = moved.masked_fill(~open_keys, 0.0).sum(-1, keepdim=True) / count
    bias.copy_(torch.where(open_keys, moved - centre, bias))


@contextmanager
def rebalancing(model: nn.Module, rate: float = 0.01) -> Generator[Rebalancer]:
    """Inside the block the load is counted; call `step` of what is yielded after every step of the optimiser."""
    balancer = Rebalancer(model, rate)
    try:
        yield balancer
    finally:
        balancer.detach()
