"""PHATGOOSE back from a saved composition: the same mixtures as `model.compose` builds, out of stored tensors."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel
from mixwright.composition.probe import probe
from mixwright.composition.restoring import SiteState, by_site, lora_experts
from mixwright.errors import CatalogError
from mixwright.methods.phatgoose.config import PhatgooseConfig
from mixwright.methods.phatgoose.model import token_router
from mixwright.routers.arrow import ArrowScores
from mixwright.routers.base import AbstractScores
from mixwright.routers.gate import PrototypeScores
from mixwright.routers.signature import SignatureScores


def restore(
    config: PhatgooseConfig, backbone: nn.Module, state: Mapping[str, Tensor], pool: Sequence[str]
) -> ComposedModel:
    """The model whose `added_state()` was `state`. Raises CatalogError (TENSOR, SHAPE) for tensors that do not fit."""
    stored = by_site(state, backbone)
    seen = probe(backbone, list(stored))
    mixtures: dict[str, Mixture] = {}
    for path in seen.sites:
        tensors = stored[path]
        base = backbone.get_submodule(path)
        device = base.get_parameter("weight").device
        members = lora_experts(tensors, path, base)
        scores = _scores(tensors, path, members.down.shape[-1], config.router)
        allowed, offset = (tensors.router.get(name) for name in ("allowed", "offset"))
        router = token_router(scores, config, seen.sites[path], allowed, offset)
        if not len(pool) == router.num_experts == members.num_experts:
            raise CatalogError(
                "SHAPE",
                path,
                f"its router knows {router.num_experts} experts and its tensors {members.num_experts}; "
                f"the pool has {len(pool)}.",
            )
        mixtures[path] = Mixture(base, router.to(device), members.to(device))
    return ComposedModel(backbone, mixtures, pool, probe=seen)


def _scores(tensors: SiteState, path: str, d_in: int, router: str) -> AbstractScores:
    kinds: dict[str, tuple[type[AbstractScores], tuple[str, ...]]] = {
        "gates": (PrototypeScores, ("prototypes",)),
        "signatures": (SignatureScores, ("weight", "bias")),
        "arrow": (ArrowScores, ("directions",)),
    }
    kind, names = kinds[router]
    own = tensors.of_router("scores")
    if set(own) != set(names) or own[names[0]].dim() != 2 or own[names[0]].shape[1] != d_in:
        raise CatalogError(
            "TENSOR", path, f"router={router} has scores of ({', '.join(names)}); these are {sorted(own)}."
        )
    return kind(**own)
