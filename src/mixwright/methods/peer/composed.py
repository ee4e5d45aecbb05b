"""A composed model whose experts are neurons: what can be asked of it, and done to it, beside running it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from mixwright.composition.model import ComposedModel
from mixwright.config import decode
from mixwright.evaluation.neuron_sites import neurons_of, plain_router
from mixwright.experts.disk_table import DiskTable, name_of, to_disk
from mixwright.experts.neuron import NeuronExperts
from mixwright.experts.quantised_table import in_fewer_bits
from mixwright.experts.table import AbstractTable
from mixwright.methods.peer.config import PeerConfig
from mixwright.methods.peer.verbs import NeuronVerbs
from mixwright.routers.product_key import ProductKeyRouter

if TYPE_CHECKING:
    from mixwright.evaluation.neuron_usage import UsageMeter

BIASES = (".bias_first", ".bias_second")
FILE = "table.file"


class PeerComposedModel(NeuronVerbs, ComposedModel):
    """A composed model whose experts are neurons: the pool has no names, and a neuron goes by its number at a site."""

    @property
    def settings(self) -> PeerConfig:
        """The config that the model was composed with."""
        return decode(PeerConfig, self.composition.config, where="composition.config")

    @property
    def layers(self) -> dict[str, tuple[ProductKeyRouter, NeuronExperts]]:
        """Site -> its router and its neurons, without what may be wrapped around them."""
        return {
            site: (plain_router(mixture.router), neurons_of(mixture.experts)) for site, mixture in self.mixtures.items()
        }

    def added_state(self) -> dict[str, Tensor]:
        """As of any composed model; a table that several sites share is there once, at the first of them.

        Biases that keep sub-keys out are the lowest number of their type, since files hold finite numbers only. A table
        on a disk is named and not copied. Raises ValueError for one that lies on several processes.
        """
        state, known = super().added_state(), set[int]()
        for site, (_, experts) in self.layers.items():
            if experts.table.collective:
                raise ValueError(
                    f"the table at {site} lies on several processes; call experts.sharding.unshard(model) on all of "
                    "them before saving, or experts.table_shards.save_tables(model, folder) for the tables alone."
                )
            if id(experts.table) in known:
                own = f"{site}.experts."
                state = {name: t for name, t in state.items() if not (name.startswith(own) and ".table." in name)}
            elif isinstance(experts.table, DiskTable):
                inside = "experts." if f"{site}.experts.dense.rows" in state else ""  # of a dense branch's wrapping
                state[f"{site}.experts.{inside}{FILE}"] = name_of(experts.table)
            known.add(id(experts.table))
        return {name: finite(tensor) if name.endswith(BIASES) else tensor for name, tensor in state.items()}

    def quantize(self, dtype: Literal["int8", "bfloat16"] = "int8") -> "PeerComposedModel":
        """Keep the rows in fewer bits from now on, as `PEER.quantize` does; returns this model."""
        return self._with_tables(lambda table, _: in_fewer_bits(table, dtype))

    def to_disk(self, folder: str | os.PathLike[str], cache_bytes: int = 1 << 26) -> "PeerComposedModel":
        """Read the rows from files `<site>.rows` from now on, as `PEER.to_disk` does; returns this model. Saved, it
        names the files."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        return self._with_tables(lambda table, site: to_disk(table, Path(folder) / f"{site}.rows", cache_bytes))

    def _with_tables(self, make: Callable[[AbstractTable, str], AbstractTable]) -> "PeerComposedModel":
        """Every table anew, those that sites share once."""
        made: dict[AbstractTable, AbstractTable] = {}
        for site, (_, experts) in self.layers.items():
            if experts.table not in made:
                made[experts.table] = make(experts.table, site)
            experts.table = made[experts.table]
        return self

    def keep_usage(self, *, detail: bool = False) -> "UsageMeter":
        """Count every pass from now on, in what `save_pretrained` writes; see `usage.keep_usage`."""
        from mixwright.methods.peer.usage import keep_usage

        return keep_usage(self, detail=detail)


def finite(bias: Tensor) -> Tensor:
    """A selection bias as it is written."""
    return bias.clamp_min(torch.finfo(bias.dtype).min)


def infinite(bias: Tensor) -> Tensor:
    """A selection bias as it was before it was written."""
    return bias.masked_fill(bias == torch.finfo(bias.dtype).min, -torch.inf)
