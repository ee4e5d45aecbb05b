"""PEER back from a saved composition: what `model.compose` builds, around stored tensors instead of drawn ones."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn

from mixwright.composition.mixture import Mixture
from mixwright.composition.model import Composition
from mixwright.composition.probe import probe
from mixwright.composition.restoring import SiteState, by_site, of_whole
from mixwright.errors import CatalogError
from mixwright.experts.neuron import NeuronExperts
from mixwright.experts.table import AbstractTable, NeuronTable
from mixwright.methods.peer.config import METHOD, PeerConfig
from mixwright.methods.peer.feed_forward import Place, feed_forwards, observed
from mixwright.methods.peer.model import (
    PeerComposedModel,
    device_at,
    make_experts,
    make_router,
    mixture_at,
    width_of,
)
from mixwright.routers.product_key import ProductKeyRouter

_TABLE = "table."


def restore(
    config: PeerConfig, backbone: nn.Module, state: Mapping[str, Tensor], ids: Sequence[str]
) -> PeerComposedModel:
    """The model whose `added_state()` was `state`. Raises CatalogError (TENSOR, SHAPE) for tensors that do not fit.

    How many experts a site has is read off its tensors, since layers grow; all else is the config's.
    """
    settled = config.settled()
    if ids:
        raise CatalogError("SHAPE", "pool", f"it names {len(ids)} experts; PEER's are neurons and have no names.")
    of_sites, whole = of_whole(state)
    paths = [path for path, _ in backbone.named_modules() if path]
    stored = by_site(of_sites, backbone, paths)
    if not stored:
        raise CatalogError("TENSOR", "added state", "it holds no tensor of any site.")
    known = feed_forwards(backbone)
    found = {path: known.get(path, Place(path, 0, 0)) for path in stored}
    chosen = observed(backbone, found, alone=settled.mode == "replace")
    seen = probe(backbone, list(chosen))
    mixtures: dict[str, Mixture] = {}
    table: AbstractTable | None = None
    for path in seen.sites:
        width, device = width_of(chosen[path]), device_at(backbone, path)
        router = _router(settled, width, stored[path], path).to(device)
        if table is None or not settled.shared_table:
            table = _table(settled, width, router.num_experts, stored[path], path)
        experts = _experts(settled, width, table, stored[path], path).to(device)
        mixtures[path] = mixture_at(backbone, chosen[path], settled, router, experts)
    described = Composition(method=METHOD.name, config=asdict(settled), citation=METHOD.paper.bibtex)
    model = PeerComposedModel(backbone, mixtures, (), described, seen).train(backbone.training)
    model.whole.update(whole)
    return model


def _router(config: PeerConfig, width: int, state: SiteState, path: str) -> ProductKeyRouter:
    keys = [state.router.get(name) for name in ("keys_first", "keys_second")]
    if any(half is None or half.dim() != 3 for half in keys):
        raise CatalogError("TENSOR", path, "its sub-keys (keys_first, keys_second) are missing or no stacks of rows.")
    first, second = (half.shape[1] for half in keys if half is not None)
    router = make_router(config, width, (first, second))
    _fill(router, state.router, path, "router")
    return router


def _table(config: PeerConfig, width: int, experts: int, state: SiteState, path: str) -> NeuronTable:
    rows, bias = (state.experts.get(f"{_TABLE}{name}") for name in ("rows", "bias"))
    wanted = (experts, 3 if config.gated else 2, config.row_dim or width)
    if rows is None or tuple(rows.shape) != wanted:
        came = "nothing" if rows is None else str(tuple(rows.shape))
        raise CatalogError("SHAPE", path, f"the rows of its experts are {came}; the config and its keys want {wanted}.")
    if bias is not None and tuple(bias.shape) != (experts, wanted[1] - 1):
        raise CatalogError("SHAPE", path, f"table.bias is {tuple(bias.shape)}; expected {(experts, wanted[1] - 1)}.")
    return NeuronTable(rows, bias)


def _experts(config: PeerConfig, width: int, table: AbstractTable, state: SiteState, path: str) -> NeuronExperts:
    experts = make_experts(config, width, table)
    if "out_bias" in state.experts:
        experts.out_bias = nn.Parameter(torch.zeros(width))
    if any(name.startswith(_TABLE) for name in state.experts):
        _fill(experts, state.experts, path, "experts")
    else:
        held = {f"{_TABLE}{name}": tensor for name, tensor in table.state_dict().items()}
        _fill(experts, {**state.experts, **held}, path, "experts")
    return experts


def _fill(part: nn.Module, state: Mapping[str, Tensor], path: str, name: str) -> None:
    """Put stored tensors into a part. A buffer that may be None is there if it was stored."""
    for key, tensor in state.items():
        owner, _, last = key.rpartition(".")
        home = dict(part.named_modules()).get(owner)
        if home is not None and last not in vars(home) and getattr(home, last, tensor) is None:
            setattr(home, last, tensor)
    wanted = {key: tuple(tensor.shape) for key, tensor in part.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in state.items()}
    if wanted != found:
        key = sorted(set(wanted.items()) ^ set(found.items()))[0][0]
        code = "SHAPE" if key in wanted and key in found else "TENSOR"
        raise CatalogError(
            code,
            path,
            f"{name}.{key[:80]} is {found.get(key, 'missing')}; the config wants {wanted.get(key, 'nothing there')}. "
            "Load it with the config that it was saved with.",
        )
    part.load_state_dict(dict(state), assign=True)
