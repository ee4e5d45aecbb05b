"""Systems to compare: each is a way to use one composed model, so that all of them share one backbone in memory.

A system is a name, a context manager that makes the model behave, and what it knows about each batch. None of the
baselines here needs training; those with scores of their own read them off the experts, or get them from the caller.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mixwright.composition.model import ComposedModel
from mixwright.data.collate import Batch
from mixwright.evaluation.ensemble import LogitEnsemble
from mixwright.evaluation.hybrid_rows import mixes_models
from mixwright.evaluation.retrieval import Library, nearest_expert
from mixwright.experts.factored import AbstractFactored
from mixwright.experts.lora import LoraExperts
from mixwright.routers.arrow import ArrowScores
from mixwright.routers.base import AbstractRouter, AbstractScores
from mixwright.routers.constant import ConstantRouter
from mixwright.routers.gate import PrototypeScores
from mixwright.routers.spectral import SpectralScores
from mixwright.routers.task import TaskRouter
from mixwright.routers.token import TokenRouter
from mixwright.routing import Condition

Enter = Callable[[ComposedModel], AbstractContextManager[Any]]


def _tasks(model: ComposedModel, batch: Batch) -> Condition | None:
    """The tasks that the batch says its rows are of, if it says any."""
    del model
    return None if batch.task_ids is None else Condition(task_ids=batch.task_ids)


@dataclass(frozen=True)
class System:
    """`with enter(model)` makes the model this system; `condition(model, batch)` is what it knows about a batch.

    `speaker(model)` is what answers in the model's place, called as the model is: by default the model itself.
    """

    name: str
    enter: Enter
    condition: Callable[[ComposedModel, Batch], Condition | None] = _tasks
    speaker: Callable[[ComposedModel], Any] = lambda model: model


def backbone() -> System:
    """No expert acts."""
    return System("backbone", lambda model: model.disabled())


def composed(name: str = "routed") -> System:
    """The model as it was composed."""
    return System(name, lambda model: model.replaced())


def single_experts(model: ComposedModel) -> list[System]:
    """Each expert that has weights, alone, everywhere, at weight 1."""
    return [System(name, lambda m, n=name: m.only(n)) for at, name in enumerate(model.experts) if at in members(model)]


def ensemble(model: ComposedModel, name: str = "logit ensemble") -> System:
    """The mean of the logits of each expert alone: no routing, and as dear as running all of them."""
    acting = [model.experts[at] for at in members(model)]
    return System(name, lambda m: m.replaced(), speaker=lambda m: LogitEnsemble(m, acting))


def merged(model: ComposedModel, weight: float | None = None, name: str = "merged product") -> System:
    """Merged experts: W + w sum_e s_e B_e A_e; without a `weight` w = 1/E, the mean of the products."""
    acting = members(model)
    weights = torch.zeros(len(model.experts))
    weights[acting] = 1.0 / len(acting) if weight is None else weight
    return rerouted(name, {site: ConstantRouter(weights) for site in model.mixtures})


def parameter_average(model: ComposedModel) -> System:
    """W + (mean of s_e B_e)(mean of A_e): factors averaged apart, which has cross terms that the product has not.

    For experts that combine parameters it is uniform routing, and for others that are no LoRA experts uniform routing
    is all there is: it goes by that name.
    """
    experts = [mixture.experts for mixture in model.mixtures.values()]
    if not all(isinstance(members, LoraExperts) for members in experts):
        uniform = ConstantRouter(torch.full((len(model.experts),), 1.0 / len(model.experts)))
        factored = all(isinstance(members, AbstractFactored) for members in experts)
        name = "parameter average" if factored else "uniform weights"
        return rerouted(name, dict.fromkeys(model.mixtures, uniform))
    count = len(members(model))
    averaged: dict[str, LoraExperts] = {}
    for site, experts in lora(model).items():
        down = experts.down.detach().sum(0, keepdim=True) / count
        up = (experts.scale.to(experts.up.dtype)[:, None, None] * experts.up.detach()).sum(0, keepdim=True) / count
        averaged[site] = LoraExperts(down, up, torch.ones(1, device=down.device), 1)
    return adapter("parameter average", averaged)


def adapter(name: str, experts: Mapping[str, LoraExperts]) -> System:
    """One adapter in place of the pool, always on: a multitask LoRA, or an average."""
    return other_pool(name, experts, {site: ConstantRouter(torch.ones(1)) for site in experts})


def other_pool(name: str, experts: Mapping[str, LoraExperts], routers: Mapping[str, AbstractRouter]) -> System:
    """Other experts with routers of their own, on the same backbone."""
    return System(name, lambda model: model.replaced(_placed(model, routers), experts))


def rerouted(name: str, routers: Mapping[str, AbstractRouter]) -> System:
    """The same experts, chosen by other routers."""
    return System(name, lambda model: model.replaced(_placed(model, routers)))


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """What a router shares beyond the paper: see `TokenRouter`. All off is PHATGOOSE."""

    consensus: float = 0.0
    pooling: float = 0.0
    prior: float = 0.0
    null_expert: float | None = None


def scored(
    name: str,
    model: ComposedModel,
    scores: Mapping[str, AbstractScores],
    top_k: int,
    *,
    sharing: Sharing | None = None,
    offset: Float[Tensor, " experts"] | None = None,
    experts: Mapping[str, LoraExperts] | None = None,
) -> System:
    """The best `top_k` by other scores, of the model's experts or others; who does not adapt a site is masked there."""
    options = vars(sharing or Sharing())
    pool = dict(experts or lora(model))
    routers: dict[str, AbstractRouter] = {}
    for site, score in scores.items():
        seen = model.probe.sites[site]
        if sharing is not None and sharing.null_expert is not None:
            pool[site] = _with_null(pool[site])
        allowed = adapting(pool[site])[: score.num_experts]
        routers[site] = TokenRouter(
            score, top_k, allowed=allowed, offset=offset, stream=seen.shared_as, order=seen.order, **options
        )
    return other_pool(name, pool, routers)


def _with_null(experts: LoraExperts) -> LoraExperts:
    """The same experts in a pool that ends with one more id, which has no weights."""
    return LoraExperts(experts.down.data, experts.up.data, experts.scale, experts.num_experts + 1, experts.members)


def prototypes(name: str, model: ComposedModel, rows: Mapping[str, Tensor], top_k: int) -> System:
    """PHATGOOSE's router over other rows (experts, d_in): trained gates with another k, average activations."""
    return scored(name, model, {site: PrototypeScores(row) for site, row in rows.items()}, top_k)


def random_prototypes(model: ComposedModel, top_k: int, seed: int = 0) -> System:
    """PHATGOOSE's router over rows of noise: what routing is worth when it knows nothing."""
    generator = torch.Generator().manual_seed(seed)
    count = len(model.experts)
    rows = {site: torch.randn(count, e.down.shape[-1], generator=generator) for site, e in lora(model).items()}
    return prototypes("random prototypes", model, rows, top_k)


def arrow(model: ComposedModel, top_k: int) -> System:
    """Arrow (Ostapenko et al. 2024)."""
    return scored("Arrow", model, {s: ArrowScores.from_lora(f) for s, f in factors(model).items()}, top_k)


def spectral(model: ComposedModel, top_k: int) -> System:
    """SpectR (Fleshman and Van Durme 2025)."""
    return scored("SpectR", model, {s: SpectralScores.from_lora(f) for s, f in factors(model).items()}, top_k)


def retrieval(model: ComposedModel, library: Library, name: str = "retrieval") -> System:
    """The expert of the nearest training example, for the whole sequence at every site."""
    table = torch.eye(len(model.experts))
    return System(
        name,
        lambda m: m.replaced(_placed(m, {site: TaskRouter(table) for site in m.mixtures})),
        lambda m, batch: Condition(task_ids=nearest_expert(m, library, batch)),
    )


def members(model: ComposedModel) -> list[int]:
    """Pool ids of the experts that have weights somewhere: all but a null expert."""
    if mixes_models(model):
        return list(range(len(model.experts)))
    return sorted({member for experts in lora(model).values() for member in experts.members})


def lora(model: ComposedModel) -> dict[str, LoraExperts]:
    """Site -> LoRA experts. Raises ValueError for experts of another kind, whose weights these baselines can't read."""
    found: dict[str, LoraExperts] = {}
    for site, mixture in model.mixtures.items():
        if not isinstance(mixture.experts, LoraExperts):
            raise ValueError(f"{site} holds {type(mixture.experts).__name__}; this baseline reads LoRA experts only.")
        found[site] = mixture.experts
    return found


def adapting(experts: LoraExperts) -> Bool[Tensor, " experts"]:
    """Which experts of the pool adapt this site."""
    return experts.slot >= 0


def factors(model: ComposedModel) -> dict[str, Sequence[tuple[Tensor, Tensor, float] | None]]:
    """Site -> (down, up, scale) of each expert of the pool, None for one that does not adapt the site."""
    return {site: [_factor(experts, row) for row in experts.slot.tolist()] for site, experts in lora(model).items()}


def _factor(experts: LoraExperts, row: int) -> tuple[Tensor, Tensor, float] | None:
    return None if row < 0 else (experts.down[row].detach(), experts.up[row].detach(), float(experts.scale[row]))


def _placed(model: ComposedModel, routers: Mapping[str, AbstractRouter]) -> dict[str, AbstractRouter]:
    place = next(model.backbone.parameters()).device
    return {site: router.to(place) for site, router in routers.items()}
