"""PHATGOOSE (Muqeeth et al. 2024, section 3), from top to bottom: one mixture at every adapted linear layer.

At a site with input u_t and experts z that adapt it:

1. standardise u_t and every gate v_z over their n features;
2. score a_z = v_z . u_t / sqrt(n);
3. keep the k largest;
4. w = softmax over those;
5. y_t = W u_t + sum_z w_z s_z B_z A_z u_t.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel
from mixwright.experts.lora import LoraExperts
from mixwright.methods.phatgoose.config import PhatgooseConfig
from mixwright.routers.arrow import ArrowScores
from mixwright.routers.base import AbstractScores
from mixwright.routers.gate import PrototypeScores
from mixwright.routers.signature import SignatureScores
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


def scored_by(experts: Sequence["Expert"], router: str) -> str:
    """What `router="auto"` means for this pool: gates or signatures where every expert has them, else Arrow."""
    lacking = {
        "gates": [expert.id for expert in experts if not expert.gates],
        "signatures": [expert.id for expert in experts if not expert.signatures],
        "arrow": [],
    }
    if router == "auto":
        return next(kind for kind, without in lacking.items() if not without)
    if lacking[router]:
        raise ValueError(
            f"router={router!r} needs {router} for every expert; {', '.join(lacking[router][:5])} has none. Train them "
            f"(`mixwright train RECIPE --stage gate`), collect signatures (`mixwright experts sign`), or set router=auto."
        )
    return router


def _scores(path: str, experts: Sequence["Expert"], num_experts: int, router: str) -> AbstractScores:
    """Step 2. An expert that does not adapt this site scores 0 and is masked by the router."""
    nobody = [None] * (num_experts - len(experts))
    present = [expert if path in expert.factors else None for expert in experts]
    if router == "gates":
        gates = [expert and expert.gates and expert.gates.get(path) for expert in present]
        width = next(expert.factors[path].down.shape[1] for expert in present if expert)
        zero = torch.zeros(width)
        return PrototypeScores(torch.stack([zero if gate is None else gate.float() for gate in [*gates, *nobody]]))
    if router == "signatures":
        own = [expert and expert.signatures and expert.signatures.get(path) for expert in present]
        return SignatureScores.from_signatures([*own, *nobody])
    factors = [expert and expert.factors[path] for expert in present]
    return ArrowScores.from_lora([f and (f.down.float(), f.up.float(), f.scale) for f in [*factors, *nobody]])
