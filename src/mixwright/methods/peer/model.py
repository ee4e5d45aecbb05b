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
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from mixwright.backbones.hf import provenance
from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel, Composition
from mixwright.composition.probe import probe
from mixwright.config import decode
from mixwright.experts.neuron import NeuronExperts
from mixwright.experts.table import AbstractTable, NeuronTable, initial_rows
from mixwright.methods.peer.config import METHOD, PeerConfig
from mixwright.methods.peer.feed_forward import Place, observed, places
from mixwright.ops.digest import fingerprint
from mixwright.routers.product_key import ProductKeyRouter

if TYPE_CHECKING:
    from mixwright.catalog.store import Catalog


def compose(
    config: PeerConfig, backbones: Sequence[nn.Module], catalog: "Catalog | None" = None
) -> "PeerComposedModel":
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
        with _drawn(settled.seed + number, device):
            router = make_router(settled, width, settled.grid)
            if table is None or not settled.shared_table:
                table = _fresh_table(settled, width)
            elif table.width != (settled.row_dim or width):
                raise ValueError(
                    f"shared_table: {path} has the width {width}, and the rows of the sites before it {table.width}; "
                    "set row_dim, or leave shared_table out."
                )
            experts = make_experts(settled, width, table)
        mixtures[path] = mixture_at(backbone, chosen[path], settled, router.to(device), experts.to(device))
    return PeerComposedModel(backbone, mixtures, (), _description(settled, backbone), seen).train(backbone.training)


def make_router(config: PeerConfig, width: int, grid: tuple[int, int]) -> ProductKeyRouter:
    """Steps 1 to 3 for inputs of this width."""
    own = config.layer
    names = ("heads", "top_k", "gate", "query_norm", "share_keys")
    return ProductKeyRouter(width, grid, dim_key=own["dim_key"] or width, **{name: own[name] for name in names})


def make_experts(config: PeerConfig, width: int, table: AbstractTable) -> NeuronExperts:
    """Step 4 over a table, with projections where its rows are narrow."""
    into, out_of = None, None
    if config.row_dim is not None:
        into, out_of = (nn.Linear(*sizes, bias=False) for sizes in ((width, table.width), (table.width, width)))
    return NeuronExperts(table, config.layer["activation"], into, out_of)


def mixture_at(
    backbone: nn.Module, place: Place, config: PeerConfig, router: ProductKeyRouter, experts: NeuronExperts
) -> Mixture:
    """A mixture for a place: beside what stands there, or instead of it."""
    base = backbone.get_submodule(place.path) if config.mode == "parallel" else None
    return Mixture(base, router, experts, entry=place.entry)


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


class PeerComposedModel(ComposedModel):
    """A composed model whose experts are neurons: the pool has no names, and a neuron goes by its number."""

    @property
    def settings(self) -> PeerConfig:
        """The config that the model was composed with."""
        return decode(PeerConfig, self.composition.config, where="composition.config")

    @property
    def layers(self) -> dict[str, tuple[ProductKeyRouter, NeuronExperts]]:
        """Site -> its router and its experts."""
        return {
            site: (cast(ProductKeyRouter, mixture.router), cast(NeuronExperts, mixture.experts))
            for site, mixture in self.mixtures.items()
        }

    def added_state(self) -> dict[str, Tensor]:
        """As of any composed model; a table that several sites share is there once, at the first of them."""
        state, known = super().added_state(), set[int]()
        for site, (_, experts) in self.layers.items():
            if id(experts.table) in known:
                state = {name: t for name, t in state.items() if not name.startswith(f"{site}.experts.table.")}
            known.add(id(experts.table))
        return state


@contextmanager
def _drawn(seed: int, device: torch.device) -> Generator[None]:
    """Inside the block what is made is drawn from `seed`, on the CPU; on the meta device nothing is drawn."""
    with torch.random.fork_rng(devices=[]), torch.device("meta" if device.type == "meta" else "cpu"):
        torch.manual_seed(seed)
        yield


def _fresh_table(config: PeerConfig, width: int) -> NeuronTable:
    """Rows of the layer's own first values; rows out of zero where the experts stand beside a layer."""
    heads, top_k = config.layer["heads"], config.layer["top_k"]
    parts, experts = 3 if config.gated else 2, config.grid[0] * config.grid[1]
    rows = initial_rows(experts, parts, config.row_dim or width, (heads * top_k) ** -0.5)
    if config.mode == "parallel":
        rows[:, -1].zero_()
    return NeuronTable(rows.to(torch.bfloat16) if config.table_dtype == "bfloat16" else rows)


def _description(config: PeerConfig, backbone: nn.Module) -> Composition:
    return Composition(
        method=METHOD.name,
        config=asdict(config),
        backbone={**provenance(backbone), "fingerprint": fingerprint(backbone)},
        citation=METHOD.paper.bibtex,
    )
