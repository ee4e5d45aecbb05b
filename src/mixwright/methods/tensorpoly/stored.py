"""TensorPoly back from a saved composition: the same mixtures as `model.compose` builds, out of stored tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import NoReturn

import torch
from torch import Tensor, nn

from mixwright.composition.mixture import Mixture
from mixwright.composition.model import Composition
from mixwright.composition.probe import probe
from mixwright.composition.restoring import SiteState, by_site, of_whole
from mixwright.errors import CatalogError
from mixwright.methods.tensorpoly.config import MATRIX, METHOD, TensorPolyConfig
from mixwright.methods.tensorpoly.latent import assemble, positions, shapes
from mixwright.methods.tensorpoly.model import TaskComposedModel, learned, pool, shared_by
from mixwright.methods.tensorpoly.similarity import check_remembered
from mixwright.routers.base import AbstractRouter
from mixwright.routers.constant import ConstantRouter
from mixwright.sites import Site, linear_sites


def restore(
    config: TensorPolyConfig, backbone: nn.Module, state: Mapping[str, Tensor], ids: Sequence[str]
) -> TaskComposedModel:
    """The model whose `added_state()` was `state`. Raises CatalogError (TENSOR, SHAPE) for tensors that do not fit.

    Whether they fit is asked of the config and the site alone: order, ranks, leaf widths, heads, tasks and sharing.
    """
    settled, sites = config.settled(), linear_sites(backbone)
    if tuple(ids) != pool(settled):
        raise CatalogError(
            "SHAPE", "pool", f"it has {len(ids)} experts and the config num_latent={settled.num_latent}; they differ."
        )
    of_sites, whole = of_whole(state)
    stored = by_site(of_sites, backbone)
    if not stored:
        raise CatalogError("TENSOR", "added state", "it holds no tensor of any site.")
    seen = probe(backbone, list(stored))
    shared: dict[str, AbstractRouter] = {}
    mixtures: dict[str, Mixture] = {}
    for path in seen.sites:
        site, base = sites[path], backbone.get_submodule(path)
        device = next(base.parameters()).device
        down, up = _factors(settled, stored[path], site)
        experts = assemble(settled, down, up, site.d_in, site.d_out).to(device)
        router = _router(settled, stored[path], path, shared).to(device)
        mixtures[path] = Mixture(base, router, experts)
    check_remembered(whole, len(settled.tasks))
    described = Composition(method=METHOD.name, config=asdict(settled), citation=METHOD.paper.bibtex)
    model = TaskComposedModel(backbone, mixtures, ids, described, seen).train(backbone.training)
    model.whole.update(whole)
    return model


def _factors(config: TensorPolyConfig, state: SiteState, site: Site) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of A and B, if they are those of this config at this site."""
    sides: list[list[Tensor]] = []
    for side, wanted in zip(("down", "up"), shapes(config, site.d_in, site.d_out)):
        names = [side] if config.experts in MATRIX else [f"{side}.{n}" for n in range(len(wanted))]
        found = {name: tuple(t.shape) for name, t in state.experts.items() if name.split(".")[0] == side}
        if found != dict(zip(names, wanted)):
            _refuse(config, site, side, found, wanted)
        sides.append([state.experts[name].clone() for name in names])
    strange = sorted(name for name in state.experts if name.split(".")[0] not in ("down", "up"))
    if strange:
        raise CatalogError("TENSOR", site.path, f"{strange[0][:80]!r} is no tensor of latent experts.")
    return sides[0], sides[1]


def _router(config: TensorPolyConfig, state: SiteState, path: str, shared: dict[str, AbstractRouter]) -> AbstractRouter:
    """The site's router; the one that another site made where the config says that they share it."""
    name, latent, apart = "logits" if config.is_routed else "weights", config.num_latent or 1, positions(config)
    tasks = (len(config.tasks), latent) if apart is None else (len(config.tasks), apart, latent)
    wanted = tasks if config.is_routed else (latent,)
    held = state.router.get(name)
    if held is None or len(state.router) != 1 or tuple(held.shape) != wanted:
        found = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in sorted(state.router.items())) or "nothing"
        raise CatalogError(
            "SHAPE",
            path,
            f"its router holds {found}; the config ({config.experts}, {len(config.tasks)} tasks, num_latent={latent}) "
            f"wants {name} {wanted}.",
        )
    if not config.is_routed:
        return ConstantRouter(held.clone())
    key = shared_by(path, config.share)
    if key not in shared:
        shared[key] = learned(config, held.clone())
    elif not torch.equal(shared[key].get_parameter("logits").cpu(), held.cpu()):
        raise CatalogError(
            "TENSOR",
            path,
            f"with share={config.share!r} it has the router of {key or 'the model'!r}, but other logits.",
        )
    return shared[key]


def _refuse(
    config: TensorPolyConfig, site: Site, side: str, found: Mapping[str, tuple[int, ...]], wanted: object
) -> NoReturn:
    width = site.d_in if side == "down" else site.d_out
    of = "" if config.experts in MATRIX else f" of order {config.order}, {config.factorization} radices"
    held = f"of order {len(found)}, " if found and all("." in name for name in found) else ""
    raise CatalogError(
        "SHAPE",
        site.path,
        f"the config says {config.experts}{of}, rank {config.rank}, num_latent {config.num_latent}, groups "
        f"{config.groups}, so that {side} (width {width}) is {wanted}; what was saved is {held}"
        f"{sorted(found.values()) or 'nothing'}. Load it with the config that it was saved with.",
    )
