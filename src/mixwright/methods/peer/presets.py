"""Settings under which `PEER` is the layer of a paper or of a known implementation, first values included."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from mixwright.experts.neuron import NeuronExperts
from mixwright.experts.table import NeuronTable
from mixwright.methods.peer.config import PRESETS as OPTIONS
from mixwright.routers.product_key import ProductKeyRouter


class Preset(NamedTuple):
    """`options`: arguments of `PEER`, `dim_key` None for dim; `draw`: other first values than its own."""

    options: Mapping[str, Any]
    draw: Callable[[ProductKeyRouter, NeuronExperts], None] | None = None


@torch.no_grad()
def _draw_peer_pytorch(router: ProductKeyRouter, experts: NeuronExperts) -> None:
    """Tables as nn.Embedding draws them, sub-keys of deviation 0.02, queries as nn.Linear has them."""
    for keys in (router.keys_first, router.keys_second):
        nn.init.normal_(keys, std=0.02)
    if isinstance(experts.table, NeuronTable):
        experts.table.rows.normal_()


@torch.no_grad()
def _draw_memory_plus(router: ProductKeyRouter, experts: NeuronExperts) -> None:
    """As `reset_parameters` of the released code."""
    nn.init.xavier_uniform_(router.queries.weight)
    for keys in (router.keys_first, router.keys_second):
        nn.init.uniform_(keys, -(router.dim_key**-0.5), router.dim_key**-0.5)
    if isinstance(experts.table, NeuronTable):
        experts.table.rows.normal_(std=experts.table.width**-0.5)
    gate = experts.output_gate
    for layer in () if gate is None else (gate.gate, gate.out):
        nn.init.normal_(layer.weight, std=gate.out.out_features**-0.5)  # type: ignore[union-attr]


PRESETS: dict[str, Preset] = {
    "paper": Preset(OPTIONS["paper"]),
    "peer_pytorch": Preset(OPTIONS["peer_pytorch"], _draw_peer_pytorch),
    "memory_plus": Preset(OPTIONS["memory_plus"], _draw_memory_plus),
}
"""See `config.PRESETS`."""
