"""PHATGOOSE (Muqeeth et al. 2024, section 3), from top to bottom: one mixture at every adapted linear layer.

At a site with input u_t and experts z that adapt it:

1. standardise u_t and every gate v_z over their n features;
2. score a_z = v_z . u_t / sqrt(n);
3. keep the k largest;
4. w = softmax over those;
5. y_t = W u_t + sum_z w_z s_z B_z A_z u_t.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel
from mixwright.errors import IncompatibleExpert
from mixwright.experts.lora import LoraExperts
from mixwright.methods.phatgoose.config import PhatgooseConfig
from mixwright.routers.base import AbstractScores
from mixwright.routers.gate import PrototypeScores
from mixwright.routers.token import TokenRouter
from mixwright.sites import linear_sites

if TYPE_CHECKING:
    from mixwright.catalog.adapter import Expert
    from mixwright.catalog.store import Catalog

BACKBONE = "backbone"
"""Pool id of the null expert."""


def compose(config: PhatgooseConfig, backbones: Sequence[nn.Module], catalog: "Catalog | None") -> ComposedModel:
    """The active experts of `catalog` on one backbone, routed by token. Steps 1 to 5 of the module's text."""
    if len(backbones) != 1 or catalog is None:
        raise ValueError("phatgoose composes one backbone with the experts of one catalogue.")
    (backbone,) = backbones
    experts = [catalog.expert(expert) for expert in catalog.ids()]
    if not experts:
        raise ValueError(f"the catalogue {catalog.folder} has no active expert; add one with `mixwright experts add`.")
    pool = [expert.id for expert in experts]
    if config.null_expert is not None:
        pool.append(BACKBONE)
    if config.top_k > len(pool):
        raise ValueError(f"top_k={config.top_k} is larger than the pool of {len(pool)} experts; choose a smaller top_k.")
    paths = [path for path in linear_sites(backbone) if any(path in expert.factors for expert in experts)]
    mixtures = {path: _mixture(path, backbone.get_submodule(path), experts, len(pool), config) for path in paths}
    return ComposedModel(backbone, mixtures, pool)


def _mixture(
    path: str, base: nn.Module, experts: Sequence["Expert"], num_experts: int, config: PhatgooseConfig
) -> Mixture:
    weight = base.get_parameter("weight")
    factors = [expert.factors.get(path) for expert in experts] + [None] * (num_experts - len(experts))
    members = LoraExperts.stack(
        [f and (f.down.to(weight.dtype), f.up.to(weight.dtype), f.scale) for f in factors], weight.device
    )
    scores = _scores(path, experts, num_experts, config.router)
    allowed = torch.tensor([f is not None for f in factors])
    router = TokenRouter(scores, config.top_k, allowed=allowed, offset=_offset(experts, num_experts, config))
    return Mixture(base, router.to(weight.device), members)
