"""The multi-task adapter of the T5-XL architecture has the paper's parameter counts, method by method."""

from typing import Any

import pytest
import torch
from torch import nn

import mixwright as mw
from mixwright.backbones.hf import build_backbone
from mixwright.evaluation.task_cost import Cost
from mixwright.methods.tensorpoly.model import TaskComposedModel

T5_XL = {"d_model": 2048, "d_kv": 64, "num_heads": 32, "d_ff": 5120, "num_layers": 24, "num_decoder_layers": 24}
T5_XL |= {"vocab_size": 32128, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}  # type: ignore[dict-item]
TASKS = [f"task {i}" for i in range(313)]

ROWS: list[tuple[str, dict[str, Any], int, int]] = [
    ("lora", {}, 2_211_840, 0),
    ("poly", {}, 17_694_720, 3_456),
    ("mhr", {}, 17_694_720, 221_184),
    ("lora", {"rank": 16}, 35_389_440, 0),
    ("tlora", {}, 1_391_616, 0),
    ("tlora", {"order": 4}, 405_504, 0),
    ("tensorpoly-1", {}, 11_132_928, 3_456),
    ("tensorpoly-1", {"order": 3}, 4_589_568, 3_456),
    ("tensorpoly-1", {"order": 4}, 3_244_032, 3_456),
    ("tensorpoly-2", {}, 11_132_928, 6_912),
    ("tensorpoly-2", {"order": 4}, 3_244_032, 13_824),
    ("tensorpoly-1", {"rank": 1}, 695_808, 3_456),
    ("tensorpoly-1", {"rank": 1, "order": 4}, 202_752, 3_456),
]


FULL = ("mhr", "tensorpoly-1 order 4")
"""Rows that are counted on all 24 + 24 blocks; the others on one of each, times 24, which saves a minute."""


@pytest.fixture(scope="module")
def t5_xl() -> nn.Module:
    with torch.device("meta"):
        return build_backbone("t5", T5_XL, kind="seq2seq")


@pytest.fixture(scope="module")
def one_block() -> nn.Module:
    with torch.device("meta"):
        return build_backbone("t5", {**T5_XL, "num_layers": 1, "num_decoder_layers": 1}, kind="seq2seq")


def cost_of(backbone: nn.Module, experts: str, **settings: Any) -> Cost:
    model = mw.compose("tensorpoly", backbone=backbone, tasks=TASKS, experts=experts, **settings)
    assert isinstance(model, TaskComposedModel) and model.probe.ran
    assert all(p.is_meta for p in model.parameters())
    cost = model.cost()
    model.remove()
    return cost


@pytest.mark.parametrize(("experts", "settings", "stored", "per_task"), ROWS)
def test_the_papers_counts(
    t5_xl: nn.Module, one_block: nn.Module, experts: str, settings: dict[str, Any], stored: int, per_task: int
) -> None:
    whole = " ".join([experts, *(f"{key} {value}" for key, value in settings.items())]) in FULL
    cost, times = cost_of(t5_xl if whole else one_block, experts, **settings), 1 if whole else 24
    assert (times * cost.sites, times * cost.stored, times * cost.router_per_task) == (432, stored, per_task)
    assert cost.router == 313 * cost.router_per_task and cost.trained == cost.stored + cost.router
    rank = settings.get("rank") or (1 if experts in ("lora", "poly", "mhr") else 16)
    assert (times * cost.merged, cost.merged_rank) == (rank * 2_211_840, rank)
    assert cost.per_latent == cost.stored // (1 if experts in ("lora", "tlora") else 8)


def test_exact_radices_keep_the_size_and_lose_the_dead_entries(one_block: nn.Module) -> None:
    ceil, exact = (cost_of(one_block, "tlora", order=4, factorization=f) for f in ("ceil", "exact"))
    assert ceil.dead == 16 * (12 * 2 + 4 * 2 + 2 * 2) and exact.dead == 0, "one entry of the first leaf of either width"
    assert 0.9 < exact.stored / ceil.stored < 1.05


def test_routers_of_a_model_and_of_blocks(one_block: nn.Module) -> None:
    assert cost_of(one_block, "tensorpoly-1", share="model").router == 313 * 8
    assert cost_of(one_block, "tensorpoly-1", share="block").router == 2 * 313 * 8
