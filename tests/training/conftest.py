"""Toy tasks that a tiny model learns in a second, and one expert of PHATGOOSE on it."""

from collections.abc import Callable

import pytest
import torch

from mixwright.backbones.hf import byte_tokenizer
from mixwright.backbones.tiny import tiny_backbone
from mixwright.data.batches import Batches, make_batches
from mixwright.data.collate import Kind
from mixwright.data.tasks import Example, TextTask
from mixwright.methods.phatgoose.config import PhatgooseConfig

torch.set_num_threads(1)

FAMILY = {"causal": "llama", "seq2seq": "t5", "encoder": "bert"}
COLOURS = ("a red thing", "a green thing", "a blue thing")


def toy_task(kind: str) -> TextTask:
    if kind == "encoder":
        rows = [Example(f"{word} {n}", label=i) for n in range(8) for i, word in enumerate(("rose", "leaf", "sky"))]
        return TextTask("colours", "label", tuple(rows), COLOURS)
    return TextTask("triples", "prompt", tuple(Example(f"{c * 2}:", target=c * 3) for c in "abcdefghij"))


def toy_batches(kind: Kind, *, batch_size: int = 4, seed: int = 0) -> Batches:
    return make_batches(toy_task(kind), byte_tokenizer(kind), kind, batch_size=batch_size, seed=seed, max_length=32)


@pytest.fixture
def batches() -> Callable[..., Batches]:
    return toy_batches


@pytest.fixture
def backbone() -> Callable[..., torch.nn.Module]:
    return lambda kind="causal", **settings: tiny_backbone(FAMILY[kind], **settings)


@pytest.fixture
def small() -> PhatgooseConfig:
    return PhatgooseConfig(rank=4, alpha=4.0, expert_steps=6, gate_steps=4, warmup=0.2)
