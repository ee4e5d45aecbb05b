"""The language models of the PEER suite: one small GPT whose middle feed-forward layer is what is compared.

Floating-point operations are counted for one token's forward pass, two for a multiplication and an addition.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import mixwright as mw
from mixwright.backbones.hf import build_backbone

LAYERS, MIDDLE = 3, 1
BALANCE = 0.01


@dataclass(frozen=True, kw_only=True)
class System:
    """A middle layer: `kind` dense, moe, pkm or peer; `settings` of its constructor."""

    name: str
    kind: str = "peer"
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of the models and their passes."""

    width: int = 96
    heads: int = 4
    vocabulary: int = 1024
    length: int = 64
    batch: int = 16


class CoarseExperts(nn.Module):
    """A mixture of ordinary feed-forward experts, `top_k` per token, with the balance loss of Switch and GShard."""

    def __init__(self, width: int, hidden: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)) for _ in range(experts)
        )
        self.balance = torch.zeros(())
        self.mass = torch.zeros(experts)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        probabilities = self.router(flat).softmax(-1)
        weights, chosen = probabilities.topk(self.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            out.index_add_(0, token, expert(flat[token]) * weights[token, place, None])
        load = functional.one_hot(chosen, len(self.experts)).sum((0, 1)) / chosen.numel()
        self.balance = len(self.experts) * (load * probabilities.mean(0)).sum()
        if not self.training:
            self.mass = self.mass.index_add(0, chosen.flatten(), weights.flatten())
        return out.view_as(x)


def language_model(system: System, size: Size, seed: int) -> nn.Module:
    """A GPT-NeoX of three blocks, with `system` in the middle."""
    settings = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.width,
        "intermediate_size": 4 * size.width,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": size.heads,
        "max_position_embeddings": size.length,
        "use_parallel_residual": False,
        "tie_word_embeddings": False,
    }
    model = build_backbone("gpt_neox", settings, kind="causal", seed=seed)
    torch.manual_seed(seed)
    if system.kind == "moe":
        model.gpt_neox.layers[MIDDLE].mlp = CoarseExperts(size.width, **system.settings)
    elif system.kind in ("peer", "pkm"):
        model.gpt_neox.layers[MIDDLE].mlp = peer(system, size, model.gpt_neox.layers[MIDDLE].mlp)
    return model


def peer(system: System, size: Size, replaced: nn.Module) -> "mw.PEER":
    """The layer of a system, whose outputs have the size of those of the layer that it replaces; a product-key memory
    is one whose experts are values only."""
    layer = mw.PEER(size.width, values_only=system.kind == "pkm", **system.settings)
    normed = torch.randn(256, size.width)  # what a layer norm hands on
    with torch.no_grad():
        layer.eval().calibrate(normed, float(replaced(normed).square().mean().sqrt()))
    return layer


def middle(model: nn.Module) -> nn.Module:
    """The layer that is compared."""
    return model.gpt_neox.layers[MIDDLE].mlp  # type: ignore[union-attr,return-value]


def operations(system: System, size: Size) -> int:
    """Of one token's forward pass through the whole model."""
    d, dense = size.width, 16 * size.width**2
    attention = LAYERS * (8 * d * d + 2 * size.length * d)
    shared = attention + (LAYERS - 1) * dense + 2 * d * size.vocabulary
    if system.kind == "dense":
        return shared + dense
    given = system.settings
    if system.kind == "moe":
        return shared + 2 * d * given["experts"] + given["top_k"] * 4 * d * given["hidden"]
    n1, n2 = given["num_experts"]
    query = 2 * d * given["heads"] * given["dim_key"]
    keys = given["heads"] * (n1 + n2) * given["dim_key"]
    rows = 1 if system.kind == "pkm" else 2
    return shared + query + keys + 2 * rows * given["heads"] * given["top_k"] * d
