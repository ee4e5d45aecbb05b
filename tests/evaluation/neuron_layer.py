"""A layer of retrieved neurons by itself, as small as it gets: a router and experts."""

from typing import Any

import torch
from torch import Tensor, nn

from mixwright.experts.base import AbstractExperts
from mixwright.experts.neuron import NeuronExperts
from mixwright.experts.table import NeuronTable, initial_rows
from mixwright.routers.product_key import ProductKeyRouter
from mixwright.routers.retriever import AbstractRetriever
from mixwright.routing import Condition


class NeuronLayer(nn.Module):
    router: AbstractRetriever
    experts: AbstractExperts

    def __init__(self, router: ProductKeyRouter, experts: NeuronExperts) -> None:
        super().__init__()
        self.router, self.experts = router, experts

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        condition = Condition(token_mask=token_mask)
        return self.experts(x, self.router(x, condition), condition)


def neuron_layer(
    d: int = 8, grid: tuple[int, int] = (5, 4), *, parts: int = 2, seed: int = 0, **options: Any
) -> NeuronLayer:
    """In eval mode, with keys long enough for scores that differ."""
    torch.manual_seed(seed)
    router = ProductKeyRouter(d, grid, **{"heads": 2, "top_k": 3, "dim_key": 6, **options})
    router.keys_first.data.mul_(2)
    table = NeuronTable(initial_rows(router.num_experts, parts, d, 0.5))
    return NeuronLayer(router, NeuronExperts(table)).eval()


def tokens(*shape: int, d: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(*shape, d, generator=torch.Generator().manual_seed(seed))
