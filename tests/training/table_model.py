"""A small language model over bytes with a PEER layer, for stages that train tables by rows."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mixwright.methods.peer.layer import PEER
from mixwright.training.stage import ParamGroup, Stage

SYMBOLS = 512


class TableModel(nn.Module):
    def __init__(self, dtype: torch.dtype, query_norm: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS, 6)
        self.layer = PEER(6, num_experts=(24, 20), heads=2, top_k=2, dim_key=4, query_norm=query_norm)
        self.head = nn.Linear(6, SYMBOLS)
        self.to(torch.float64)
        self.layer.experts.table.to(dtype)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.layer(x, mask))


def table_model(dtype: torch.dtype = torch.float64, query_norm: str = "batch") -> TableModel:
    torch.manual_seed(0)
    return TableModel(dtype, query_norm)


def loss(model: nn.Module, batch: Any) -> Tensor:
    logits = model(batch.inputs["input_ids"] % SYMBOLS, batch.inputs["attention_mask"].bool())
    return cross_entropy(logits.flatten(0, 1), batch.targets.flatten() % SYMBOLS, reduction="sum")


def table_stage(optimizer: Any, **options: Any) -> Stage:
    settings = {"steps": 8, "warmup": 0.3, "cooldown": 0.3, "weight_decay": 0.1, "objective": loss, **options}
    tables = ParamGroup(select=("*.table.rows",), lr=0.08, optimizer=optimizer, lr_end=0.25)
    rest = ParamGroup(select=("embed.*", "head.*", "*.router.*"), lr=0.02)
    return Stage(name="tables", groups=(tables, rest), **settings)
