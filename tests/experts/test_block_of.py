"""The block of a parameter, by its name, in models of many makes."""

import pytest
from torch import nn

from mixwright.backbones.tiny import tiny_backbone
from mixwright.experts.block_of import OUTSIDE, block_of


@pytest.mark.parametrize(
    ("names", "blocks"),
    [
        (["encoder.layer.0.norm.weight", "encoder.layer.1.norm.weight"], ["encoder.layer.0", "encoder.layer.1"]),
        (["blocks.0.mlp.0.bias", "blocks.11.mlp.2.bias", "norm.bias"], ["blocks.0", "blocks.11", OUTSIDE]),
        (
            ["stages.0.layers.0.gamma", "stages.0.layers.1.gamma", "stages.1.gamma"],
            ["stages.0", "stages.0", "stages.1"],
        ),
        (["conv1.weight", "layer1.0.conv1.weight", "layer1.1.conv1.weight"], [OUTSIDE, "layer1.0", "layer1.1"]),
        (["0.auto_model.layer.0.w", "0.auto_model.layer.1.w"], ["0.auto_model.layer.0", "0.auto_model.layer.1"]),
        (["embeddings.0.weight", "layer.0.weight", "layer.1.weight"], [OUTSIDE, "layer.0", "layer.1"]),
        (["masks.0", "masks.1"], [OUTSIDE, OUTSIDE]),  # members of a list of parameters are no modules
        (["weight"], [OUTSIDE]),
    ],
)
def test_blocks_by_name(names: list[str], blocks: list[str]) -> None:
    assert list(block_of(names).values()) == blocks


@pytest.mark.parametrize(
    ("family", "place"), [("vit", "layers."), ("bert", "encoder.layer."), ("gpt2", "transformer.h.")]
)
def test_the_layers_of_a_transformer_are_its_blocks(family: str, place: str) -> None:
    found = block_of(name for name, _ in tiny_backbone(family).named_parameters())
    assert {block for block in found.values() if block != OUTSIDE} == {f"{place}{at}" for at in range(2)}
    assert all(name.startswith(f"{block}.") for name, block in found.items() if block != OUTSIDE)
    assert OUTSIDE in found.values()


def test_the_layers_of_a_sequential_are_its_blocks() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    assert set(block_of(name for name, _ in model.named_parameters()).values()) == {"0", "2"}
