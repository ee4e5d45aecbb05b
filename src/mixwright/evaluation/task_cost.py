"""What a task-routed model costs in numbers: stored, trained, and merged for one task are three different counts."""

from dataclasses import dataclass

from torch import nn

from mixwright.composition.model import ComposedModel
from mixwright.experts.factored import AbstractFactored
from mixwright.experts.tensor import OrderedTensorExperts, TensorExperts
from mixwright.ops.tensor_product import dead_entries
from mixwright.routers.task import TaskLogits


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Numbers, summed over the sites; a router that several sites share counts once."""

    sites: int
    """Adapted layers."""
    stored: int
    """Of the latent experts: leaves, or A and B."""
    router: int
    """Of Z, for all tasks."""
    router_per_task: int
    """Of Z, for one task: what `-z` transfer trains."""
    trained: int
    """That ask for a gradient now; after composing, `stored` and `router`."""
    per_latent: int
    """`stored` over the number of latent experts: what the papers quote as the cost of adapting to a task."""
    merged: int
    """Of one task's LoRA, r (d_in + d_out) at each site: what is served."""
    merged_rank: int
    """Its rank r."""
    dead: int
    """Of `stored`, entries that are never read, since the product is cut; none with `factorization="exact"`."""


def count(model: ComposedModel) -> Cost:
    """The cost of a model."""
    mixtures = model.mixtures
    experts = [mixture.experts for mixture in mixtures.values() if isinstance(mixture.experts, AbstractFactored)]
    routers = {id(m.router): m.router for m in mixtures.values() if isinstance(m.router, TaskLogits)}
    stored = sum(_numbers(one) for one in experts)
    router = sum(_numbers(one) for one in routers.values())
    return Cost(
        sites=len(mixtures),
        stored=stored,
        router=router,
        router_per_task=sum(one.logits[0].numel() for one in routers.values()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        per_latent=stored // max(1, len(model.experts)),
        merged=sum(one.rank * (one.d_in + one.d_out) for one in experts),
        merged_rank=max((one.rank for one in experts), default=0),
        dead=sum(_dead(one) for one in experts),
    )


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _dead(experts: AbstractFactored) -> int:
    if not isinstance(experts, TensorExperts | OrderedTensorExperts):
        return 0
    return sum(
        dead * leaf.numel() // leaf.shape[-1]
        for leaves, width in ((experts.down, experts.d_in), (experts.up, experts.d_out))
        for leaf, dead in zip(leaves, dead_entries(width, [leaf.shape[-1] for leaf in leaves]))
    )
