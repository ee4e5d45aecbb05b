"""Where a model retrieves single neurons: its sites, each a router that retrieves and experts in a table."""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel
from mixwright.experts.base import AbstractExperts
from mixwright.experts.dense_branch import DenseBranch
from mixwright.experts.neuron import NeuronExperts
from mixwright.routers.product_key import ProductKeyRouter
from mixwright.routers.retriever import AbstractRetriever, counted_tokens
from mixwright.routing import Condition

ALONE = "layer"
"""What a layer is called that is the whole model."""


class NeuronSite(Protocol):
    """A module with a router that retrieves and experts that are neurons, such as a mixture."""

    router: AbstractRetriever
    experts: AbstractExperts
    training: bool


def neuron_sites(model: nn.Module) -> dict[str, NeuronSite]:
    """Name -> every module of `model` whose `router` retrieves for its `experts`: mixtures, or layers by themselves.

    Raises ValueError where there is none.
    """
    found = dict(_mixtures(model) if isinstance(model, ComposedModel) else _layers(model))
    if not found:
        raise ValueError(f"{type(model).__name__} retrieves no neurons anywhere; compose one with method 'peer'.")
    return found


def _mixtures(model: ComposedModel) -> Iterator[tuple[str, Any]]:
    for site, mixture in model.mixtures.items():
        if isinstance(mixture.router, AbstractRetriever):
            yield site, mixture


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(getattr(module, "router", None), AbstractRetriever) and hasattr(module, "experts"):
            yield (module.site if isinstance(module, Mixture) and module.site else name or ALONE), module


def plain_router(router: Any) -> ProductKeyRouter:
    """The product-key router inside whatever is wrapped around it."""
    while not isinstance(router, ProductKeyRouter):
        router = router.router
    return router


def real_tokens(
    x: Float[Tensor, "*batch d_in"], condition: Condition
) -> tuple[Float[Tensor, "tokens d_in"], Bool[Tensor, " tokens"]]:
    """What a router is given, flat, and which tokens are real."""
    counted = counted_tokens(x.shape[:-1], condition)
    flat = x.reshape(-1, x.shape[-1])
    return flat, flat.new_ones(len(flat), dtype=torch.bool) if counted is None else counted.reshape(-1)


def neurons_of(experts: Any) -> NeuronExperts:
    """The neurons, beside a dense branch or without one."""
    while isinstance(experts, DenseBranch):
        experts = experts.experts
    if not isinstance(experts, NeuronExperts):
        raise ValueError(f"expected neurons in a table, got {type(experts).__name__}.")
    return experts
