"""A tiny decoder with neurons in place of its feed-forward layers, put together by hand."""

import torch
from torch import Tensor

from mixwright.backbones.tiny import tiny_backbone
from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel
from mixwright.experts.neuron import NeuronExperts
from mixwright.experts.table import NeuronTable, initial_rows
from mixwright.routers.product_key import ProductKeyRouter

SITES = ("model.layers.0.mlp", "model.layers.1.mlp")


def neuron_model(*, shared: bool = False) -> ComposedModel:
    """Beside the feed-forward layers, so that there is something to put back."""
    torch.manual_seed(0)
    backbone, mixtures = tiny_backbone("llama"), dict[str, Mixture]()
    tables = [NeuronTable(initial_rows(48, 2, 32, 0.5)) for _ in SITES]
    for site, table in zip(SITES, [tables[0]] * 2 if shared else tables, strict=True):
        router = ProductKeyRouter(32, (8, 6), heads=2, top_k=4, dim_key=16)
        router.keys_first.data.mul_(4)
        mixtures[site] = Mixture(backbone.get_submodule(site), router, NeuronExperts(table))
    return ComposedModel(backbone, mixtures, ()).eval()


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    """The last rows are padded on the left."""
    found: list[dict[str, Tensor]] = []
    for seed in range(count):
        ids = torch.randint(3, 264, (4, 9), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones_like(ids)
        mask[2:, :3] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found
