"""PHATGOOSE (Muqeeth et al. 2024, section 3), from top to bottom: one mixture at every adapted linear layer.

At a site with input u_t and experts z that adapt it:

1. standardise u_t and every gate v_z over their n features;
2. score a_z = v_z . u_t / sqrt(n);
3. keep the k largest;
4. w = softmax over those;
5. y_t = W u_t + sum_z w_z s_z B_z A_z u_t.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mixwright.backbones.hf import provenance
from mixwright.catalog.fit import fit
from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel, Composition
from mixwright.composition.probe import Seen, probe
from mixwright.composition.selfcheck import self_check
from mixwright.experts.lora import LoraExperts
from mixwright.methods.phatgoose.config import METHOD, PhatgooseConfig
from mixwright.ops.digest import fingerprint
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
    """The active experts of `catalog` on one backbone, routed by token: steps 1 to 5 of the module's text.

    Raises ValueError for a pool that the config does not fit, CatalogError or IncompatibleExpert for an expert that
    does not fit the backbone or fails the self-check; the backbone is then as it was.
    """
    if len(backbones) != 1 or catalog is None:
        raise ValueError("phatgoose composes one backbone with the experts of one catalogue.")
    (backbone,) = backbones
    catalog.bind(backbone)
    experts = [catalog.expert(expert) for expert in catalog.ids()]
    pool = [expert.id for expert in experts] + [BACKBONE] * (config.null_expert is not None)
    if not experts:
        raise ValueError(f"the catalogue {catalog.folder} has no active expert; add one with `mixwright experts add`.")
    if config.top_k > len(pool):
        raise ValueError(
            f"top_k={config.top_k} is larger than the pool of {len(pool)} experts; choose a smaller top_k."
        )
    sites = linear_sites(backbone)
    for expert in experts:
        fit(expert, sites)
    settled = replace(config, router=scored_by(experts, config.router))
    seen = probe(backbone, [path for path in sites if any(path in expert.factors for expert in experts)])
    mixtures = {path: _mixture(path, experts, pool, backbone, settled, seen.sites[path]) for path in seen.sites}
    model = ComposedModel(backbone, mixtures, pool, _description(settled, backbone, experts), seen)
    self_check(model, {expert.id: expert.factors for expert in experts})
    return model


def _mixture(
    path: str,
    experts: Sequence["Expert"],
    pool: Sequence[str],
    backbone: nn.Module,
    config: PhatgooseConfig,
    seen: Seen,
) -> Mixture:
    base = backbone.get_submodule(path)
    allowed = torch.tensor([path in expert.factors for expert in experts])
    router = token_router(_scores(path, experts, config.router), config, seen, allowed, _offset(experts, config))
    return Mixture(base, router.to(base.get_parameter("weight").device), _members(path, experts, pool, base))


def _members(path: str, experts: Sequence["Expert"], pool: Sequence[str], base: nn.Module) -> LoraExperts:
    """The LoRAs that adapt this site, in the dtype of the layer they stand beside; the null expert has none."""
    weight = base.get_parameter("weight")
    factors = [expert.factors.get(path) for expert in experts] + [None] * (len(pool) - len(experts))
    return LoraExperts.stack(
        [f and (f.down.to(weight.dtype), f.up.to(weight.dtype), f.scale) for f in factors], weight.device
    )


def token_router(
    scores: AbstractScores, config: PhatgooseConfig, seen: Seen, allowed: Tensor | None, offset: Tensor | None
) -> TokenRouter:
    """Steps 1 to 4, among the experts that adapt this site."""
    return TokenRouter(
        scores,
        config.top_k,
        allowed=allowed,
        offset=offset,
        null_expert=config.null_expert,
        pooling=config.pooling,
        consensus=config.consensus,
        prior=config.prior,
        stream=seen.shared_as,
        order=seen.order,
    )


def _offset(experts: Sequence["Expert"], config: PhatgooseConfig) -> Tensor | None:
    """Each expert's measured gain over the backbone, added to its scores; None where quality does not count."""
    if not config.quality:
        return None
    lacking = [expert.id for expert in experts if "gain" not in expert.card.quality]
    if lacking:
        raise ValueError(
            f"quality={config.quality} needs a measured gain for every expert; {', '.join(lacking[:5])} has none. "
            "Measure it with `mixwright experts measure`, or set quality=0."
        )
    return config.quality * torch.tensor([float(expert.card.quality["gain"]["value"]) for expert in experts])


def _description(config: PhatgooseConfig, backbone: nn.Module, experts: Sequence["Expert"]) -> Composition:
    cards = [asdict(expert.card) for expert in experts]
    return Composition(
        method="phatgoose",
        config=asdict(config),
        backbone={**provenance(backbone), "fingerprint": fingerprint(backbone)},
        experts=cards,
        citation=METHOD.paper.bibtex,
    )


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
            f"router={router!r} needs {router} for every expert; {', '.join(lacking[router][:5])} has none. Train "
            "gates (`mixwright train RECIPE --stage gate`), take signatures (`experts sign`), or router=auto."
        )
    return router


def _scores(path: str, experts: Sequence["Expert"], router: str) -> AbstractScores:
    """Step 2. An expert that does not adapt this site scores 0 and is masked by the router."""
    adapting = [expert if path in expert.factors else None for expert in experts]
    if router == "gates":
        gates = [(expert.gates or {}).get(path) if expert else None for expert in adapting]
        zero = torch.zeros(next(gate.shape for gate in gates if gate is not None))
        return PrototypeScores(torch.stack([zero if gate is None else gate.float() for gate in gates]))
    if router == "signatures":
        return SignatureScores.from_signatures(
            [(expert.signatures or {}).get(path) if expert else None for expert in adapting]
        )
    factors = [expert.factors[path] if expert else None for expert in adapting]
    return ArrowScores.from_lora([f and (f.down.float(), f.up.float(), f.scale) for f in factors])
