"""PEER (He 2024) inside a model that exists: at a site with input x, h heads, k experts per head, N = n1 n2 experts:

1. queries q(x), one for each head, normalised over the batch (`ProductKeyRouter.queries`, `.norm`);
2. the k sub-keys of each half with the largest scores, and of their k^2 pairs the k largest sums, which are the k
   largest of all N (Algorithm 1; `ops.product_key`);
3. gates: the softmax of these k scores, for each head (equation 2);
4. y = sum over heads and retrieved experts of g sigma(<u, x>) v (equations 2 and 6; `NeuronExperts`), instead of the
   feed-forward layer, or added to it.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mixwright.backbones.hf import provenance
from mixwright.composition.mixture import Mixture
from mixwright.composition.model import Composition
from mixwright.composition.probe import probe
from mixwright.experts.table import AbstractTable
from mixwright.methods.peer.composed import PeerComposedModel
from mixwright.methods.peer.config import METHOD, PeerConfig
from mixwright.methods.peer.feed_forward import Place, observed, places
from mixwright.methods.peer.layer import PEER
from mixwright.methods.peer.presets import PRESETS
from mixwright.ops.digest import fingerprint

if TYPE_CHECKING:
    from mixwright.catalog.store import Catalog


def compose(config: PeerConfig, backbones: Sequence[nn.Module], catalog: "Catalog | None" = None) -> PeerComposedModel:
    """Fresh experts at the sites of one backbone: steps 1 to 4 of the module's text, before training.

    Everything random depends on `config.seed` alone. Raises ValueError for settings that do not fit each other or the
    backbone, IncompatibleExpert for a site where experts can't be; the backbone is then as it was.
    """
    if len(backbones) != 1 or catalog is not None:
        raise ValueError("peer trains neurons of its own on one backbone; give no catalogue.")
    (backbone,), settled = backbones, config.settled()
    chosen = observed(backbone, places(backbone, settled.sites), alone=settled.mode == "replace")
    seen = probe(backbone, list(chosen))
    mixtures: dict[str, Mixture] = {}
    table: AbstractTable | None = None
    for number, path in enumerate(seen.sites):
        width, device = width_of(chosen[path]), device_at(backbone, path)
        check_shared(settled, table, width, path)
        with _drawn(settled.seed + number, device):
            layer = fresh_layer(settled, width, table if settled.shared_table else None)
            if settled.mode == "replace" and not (settled.shared_table and table is not None):
                take_its_size(layer, chosen[path], settled)
        table = layer.experts.table
        mixtures[path] = mixture_at(backbone, chosen[path], settled, layer.to(device))
    return PeerComposedModel(backbone, mixtures, (), _description(settled, backbone), seen).train(backbone.training)


@torch.no_grad()
def fresh_layer(config: PeerConfig, width: int, table: AbstractTable | None = None) -> PEER:
    """The layer of the config with its first values; what it says is zero where it stands beside another."""
    layer = PEER.preset(config.preset, width, **options_of(config, width, config.grid), table=table)
    rows = layer.experts.table.get_parameter("rows")
    if config.mode == "parallel":
        rows[:, -1].zero_()
        gate = layer.experts.output_gate
        if gate is not None:
            gate.out.bias.zero_()
    if config.table_dtype == "bfloat16":
        layer.experts.table.to(torch.bfloat16)
    return layer


@torch.no_grad()
def take_its_size(layer: PEER, place: Place, config: PeerConfig) -> None:
    """Give the outputs the root mean square of those of the layer that it replaces, in the pass that was observed.

    A layer that speaks ten times louder than the one before it drowns what the blocks around it say. Presets that draw
    their own first values, and places whose pass is not known, keep the values that they have.
    """
    if place.passed is None or PRESETS[config.preset].draw is not None:
        return
    came, went = (tensor.detach().float().cpu() for tensor in place.passed)
    size = float(went.square().mean().sqrt())
    if size > 0 and not went.is_meta:
        layer.eval().calibrate(came, size)


def options_of(config: PeerConfig, width: int, grid: tuple[int, int]) -> dict[str, Any]:
    """What `PEER` is called with beside its width."""
    own = config.layer
    own["dim_key"] = own["dim_key"] or 2 * (width // 2)
    return {**own, "num_experts": grid, "gated": config.gated, "row_dim": config.row_dim}


def check_shared(config: PeerConfig, table: AbstractTable | None, width: int, path: str) -> None:
    """Raises ValueError where a table is to be shared by sites of several widths."""
    if config.shared_table and table is not None and table.width != (config.row_dim or width):
        raise ValueError(
            f"shared_table: {path} has the width {width}, and the rows of the sites before it {table.width}; set "
            "row_dim, or leave shared_table out."
        )


def mixture_at(backbone: nn.Module, place: Place, config: PeerConfig, layer: PEER) -> Mixture:
    """A layer at a place: beside what stands there, or instead of it."""
    base = backbone.get_submodule(place.path) if config.mode == "parallel" else None
    return Mixture(base, layer.router, layer.experts, entry=place.entry)


def width_of(place: Place) -> int:
    """Of a place that is as wide at its end as at its beginning. Raises ValueError for another."""
    if place.d_in != place.d_out:
        raise ValueError(
            f"sites: {place.path} goes from width {place.d_in} to {place.d_out}; what PEER says is as wide as what it "
            "reads. Name a feed-forward layer, or another module that keeps the width."
        )
    return place.d_in


def device_at(backbone: nn.Module, path: str) -> torch.device:
    """Where the layer at `path` is."""
    return next(backbone.get_submodule(path).parameters(), next(backbone.parameters())).device


@contextmanager
def _drawn(seed: int, device: torch.device) -> Generator[None]:
    """Inside the block what is made is drawn from `seed`, on the CPU; on the meta device nothing is drawn."""
    with torch.random.fork_rng(devices=[]), torch.device("meta" if device.type == "meta" else "cpu"):
        torch.manual_seed(seed)
        yield


def _description(config: PeerConfig, backbone: nn.Module) -> Composition:
    return Composition(
        method=METHOD.name,
        config=asdict(config),
        backbone={**provenance(backbone), "fingerprint": fingerprint(backbone)},
        citation=METHOD.paper.bibtex,
    )
