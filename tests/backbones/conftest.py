"""Hybrids of tiny models, mixed by hand: what stands at their slots is as plain as can be."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from mixwright.backbones.hf import build_backbone
from mixwright.backbones.hybrid import HybridBackbone
from mixwright.backbones.tiny import FAMILIES, tiny_backbone

torch.set_num_threads(1)

_SPECIAL: dict[str, Any] = {"vocab_size": 264, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
_OTHERS: dict[str, dict[str, Any]] = {
    "recurrent_gemma": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 8, "head_dim": 8,
    },
    "jamba": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_experts": 2, "mamba_d_state": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
    },
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gemma3n_text": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size_per_layer_input": 264, "hidden_size_per_layer_input": 8,
        "laurel_rank": 4, "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"],
    },
}  # fmt: skip


def make(family: str, seed: int = 0, **settings: Any) -> nn.Module:
    """A tiny model of a family, with weights large enough that a wrong one shows."""
    if family in FAMILIES:
        model = tiny_backbone(family, seed=seed, **settings)
    else:
        model = build_backbone(family, {**_SPECIAL, **_OTHERS[family], **settings}, kind="causal", seed=seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.add_(torch.randn(parameter.shape, generator=draw).mul(0.1).to(parameter.dtype))
    return model


def fit(x: Tensor, width: int) -> Tensor:
    """Cut or filled up with zeros."""
    return x[..., :width] if x.shape[-1] >= width else pad(x, (0, width - x.shape[-1]))


class Mixed(nn.Module):
    """sum_m w_m run_m at a slot, with widths padded and cut; a weight of 0 asks for nothing, 1 computes nothing."""

    def __init__(self, slot: Any, weights: Tensor, hybrid: HybridBackbone) -> None:
        super().__init__()
        self.slot, self.weights = slot, nn.Parameter(weights.clone())
        self.widths, self.width, self.last = hybrid.widths, hybrid.width, hybrid.num_blocks + 1

    def forward(self, x: Tensor) -> Tensor:
        live = [m for m, weight in enumerate(self.weights.tolist()) if weight]
        parts = {m: self.part(m, x) for m in live}
        if len(live) == 1:
            return parts[live[0]]
        return sum((self.weights[m] * part for m, part in parts.items()), torch.zeros(()))

    def part(self, m: int, x: Tensor) -> Tensor:
        out = self.slot.run(m, fit(x, self.widths[m]) if self.slot.number else None)
        return out if self.slot.number == self.last else fit(out, self.width)


def mixed(components: Sequence[nn.Module], rows: Sequence[Sequence[float]], **options: Any) -> HybridBackbone:
    """A hybrid with these weights in its slots: embedding, blocks, head."""
    names = [f"{type(component).__name__}-{i}" for i, component in enumerate(components)]
    hybrid = HybridBackbone(components, len(rows) - 2, names, **options).eval()
    embedding, *blocks, head = (Mixed(slot, torch.tensor(row), hybrid) for slot, row in zip(hybrid.slots, rows))
    hybrid.embedding, hybrid.head = embedding, head  # type: ignore[assignment]
    hybrid.blocks = nn.ModuleList(blocks)
    return hybrid


@pytest.fixture
def tiny() -> Callable[..., nn.Module]:
    return make


@pytest.fixture
def hybrid_of() -> Callable[..., HybridBackbone]:
    return mixed
