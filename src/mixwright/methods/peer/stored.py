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
from mixwright.evaluation.neuron_sites import plain_router
from mixwright.experts.disk_table import by_name
from mixwright.experts.quantised_table import QuantisedTable
from mixwright.experts.table import AbstractTable
from mixwright.methods.peer.composed import BIASES, FILE, PeerComposedModel, infinite
from mixwright.methods.peer.config import METHOD, PeerConfig
from mixwright.methods.peer.feed_forward import Place, feed_forwards, observed
from mixwright.methods.peer.layer import PEER
from mixwright.methods.peer.model import device_at, mixture_at, options_of, width_of
from mixwright.methods.peer.unsure import Around, taken_apart

KEYS = ("keys_first", "keys_second")

_TABLE = "table."
_ADVICE = "load it with the config that it was saved with."


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
        plain, around = _plain(settled, stored[path], path)
        shared = table if settled.shared_table else None
        layer = _layer(settled, width, plain, path, shared)
        table = layer.experts.table
        mixtures[path] = mixture_at(backbone, chosen[path], settled, layer)
        _put_around(mixtures[path], around, path, device)
    described = Composition(method=METHOD.name, config=asdict(settled), citation=METHOD.paper.bibtex)
    model = PeerComposedModel(backbone, mixtures, (), described, seen).train(backbone.training)
    model.whole.update(whole)
    return model


def _plain(config: PeerConfig, state: SiteState, path: str) -> tuple[SiteState, Around]:
    """The tensors of the site's layer by itself, and the fallback or adaptive router around it."""
    try:
        router, experts, around = taken_apart(state.router, state.experts, config.layer["activation"])
    except ValueError as error:
        raise CatalogError("TENSOR", path, f"{error} {_ADVICE}") from error
    return SiteState(router, experts), around


def _put_around(mixture: Mixture, around: Around, path: str, device: torch.device) -> None:
    try:
        router, experts = around.router(plain_router(mixture.router)), around.experts(mixture.experts)
    except ValueError as error:
        raise CatalogError("SHAPE", path, f"{error} {_ADVICE}") from error
    mixture.router, mixture.experts = router.to(device), experts.to(device)


def _layer(config: PeerConfig, width: int, state: SiteState, path: str, table: AbstractTable | None) -> PEER:
    """The layer of one site, around its tensors; `table`: another site's, for this one too."""
    grid = _grid(state, path)
    try:
        with torch.device("meta"):
            layer = PEER(width, **options_of(config, width, grid))
    except ValueError as error:
        raise CatalogError(
            "SHAPE", path, f"a grid of {grid[0]} x {grid[1]} does not fit its config: {error}"
        ) from error
    experts = state.experts
    if table is None:
        table = _kept_otherwise(experts, layer.experts.table, path)
        experts = {name: t for name, t in experts.items() if name != FILE}
    if table is not None:
        layer.experts.table = table
        experts = {**{f"{_TABLE}{name}": t for name, t in table.state_dict().items()}, **experts}
    elif "table.bias" in experts:
        layer.experts.table.bias = nn.Parameter(torch.zeros_like(experts["table.bias"]))
    if "out_bias" in experts:
        layer.experts.out_bias = nn.Parameter(torch.zeros_like(experts["out_bias"]))
    router = {name: infinite(t) if f".{name}" in BIASES else t for name, t in state.router.items()}
    _fill(layer.router, router, path, "router")
    _fill(layer.experts, experts, path, "experts")
    return layer


def _kept_otherwise(experts: Mapping[str, Tensor], wanted: AbstractTable, path: str) -> AbstractTable | None:
    """The table, where it is in a file of its own or of eight bits."""
    found: AbstractTable | None = None
    if FILE in experts:
        found = by_name(experts[FILE])
    elif "table.scales" in experts:
        rows, scales, bias = (experts.get(f"{_TABLE}{name}") for name in ("rows", "scales", "bias"))
        if rows is None or rows.dtype != torch.int8 or rows.dim() != 3 or scales is None:
            raise CatalogError("TENSOR", path, f"experts.{_TABLE}scales go with int8 rows of three axes; {_ADVICE}")
        found = QuantisedTable(rows, scales, bias)
    if found is not None and _size(found) != _size(wanted):
        raise CatalogError("SHAPE", path, f"its table has {_size(found)}, its config wants {_size(wanted)}; {_ADVICE}")
    return found


def _size(table: AbstractTable) -> str:
    return f"{table.num_experts} experts of {table.parts} rows of {table.width}"


def _grid(state: SiteState, path: str) -> tuple[int, int]:
    """Sub-keys on each axis. Layers grow, so the config does not say it."""
    sides = [half.shape[1] for name in KEYS if (half := state.router.get(name)) is not None and half.dim() == 3]
    if len(sides) < len(KEYS):
        raise CatalogError("TENSOR", path, f"its sub-keys ({', '.join(KEYS)}) are missing, or no stacks of rows.")
    return sides[0], sides[1]


def _fill(part: nn.Module, state: Mapping[str, Tensor], path: str, name: str) -> None:
    """Put stored tensors into a part: all that it has, and nothing that it has not. Growth may have added some."""
    try:
        part.load_state_dict(dict(state), strict=False, assign=True)
    except RuntimeError as error:
        words = " ".join(str(error).split(":", 1)[-1].split())
        raise CatalogError("SHAPE", path, f"its {name}: {words[:300]}; {_ADVICE}") from error
    wanted = set(part.state_dict())
    if wanted != set(state):
        key = sorted(wanted ^ set(state))[0]
        what = "missing" if key in wanted else "no part of a layer of its config"
        raise CatalogError("TENSOR", path, f"{name}.{key[:80]} is {what}; {_ADVICE}")
