"""A hybrid back from a saved composition: what `model.compose` builds, around stored tensors instead of drawn ones."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from mixwright.composition.restoring import SiteState, by_site, of_whole
from mixwright.errors import CatalogError
from mixwright.methods.manticore.config import ManticoreConfig
from mixwright.methods.manticore.model import HybridModel, compose, slots_of

_ADVICE = "load it with the config that it was saved with."


def restore(
    config: ManticoreConfig, backbone: nn.Module, state: Mapping[str, Tensor], ids: Sequence[str]
) -> HybridModel:
    """The hybrid whose `added_state()` was `state`; `backbone` is the list of its components, `ids` their names.

    Raises CatalogError (TENSOR, SHAPE) for tensors that do not fit.
    """
    if not isinstance(backbone, nn.ModuleList):
        raise CatalogError("CONFIG", "composition.yaml", "it names no components; a hybrid is made of two or more.")
    of_slots, whole = of_whole(state)
    model = compose(replace(config, names=tuple(ids), mixture_weights=None), list(backbone))
    stored = by_site(of_slots, model.backbone, slots_of(model.backbone))
    for slot, mixture in model.mixtures.items():
        found = stored.get(slot, SiteState())
        _fill(mixture.router, found.router, slot, "router")
        _fill(mixture.experts, found.experts, slot, "experts")
    model.whole.update(whole)
    return model


def _fill(part: nn.Module, state: Mapping[str, Tensor], slot: str, name: str) -> None:
    """Put stored tensors into a part: all that it has, and nothing that it has not."""
    wanted = part.state_dict()
    if set(wanted) != set(state):
        key = sorted(set(wanted) ^ set(state))[0]
        what = "missing" if key in wanted else "no part of a hybrid of its config"
        raise CatalogError("TENSOR", slot, f"{name}.{key[:80]} is {what}; {_ADVICE}")
    for key, tensor in state.items():
        if tensor.shape != wanted[key].shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(wanted[key].shape)}"
            raise CatalogError("SHAPE", slot, f"{name}.{key[:80]} has the shape {shapes}; {_ADVICE}")
    part.load_state_dict(dict(state))
