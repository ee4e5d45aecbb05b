"""Feed-forward layers are found by structure in every family, and what is none is refused in words."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixwright.backbones.tiny import FAMILIES, tiny_backbone
from mixwright.errors import IncompatibleExpert
from mixwright.methods.peer.feed_forward import Place, feed_forwards, observed, places

WHOLE = {
    "t5": ("encoder.block.0.layer.1.DenseReluDense", "decoder.block.0.layer.2.DenseReluDense"),
    "gpt2": ("transformer.h.0.mlp", "transformer.h.1.mlp"),
    "gpt_neox": ("gpt_neox.layers.0.mlp", "gpt_neox.layers.1.mlp"),
    "falcon": ("transformer.h.0.mlp", "transformer.h.1.mlp"),
    "vit": ("layers.0.mlp", "layers.1.mlp"),
    "distilbert": ("transformer.layer.0.ffn", "transformer.layer.1.ffn"),
    **dict.fromkeys(
        ("llama", "qwen3", "gemma", "mistral", "phi", "gemma3", "mixtral"), ("model.layers.0.mlp", "model.layers.1.mlp")
    ),
}
HALVES = {
    "bert": ("encoder.layer.#.intermediate.dense", "encoder.layer.#.output.dense", 2),
    "roberta": ("encoder.layer.#.intermediate.dense", "encoder.layer.#.output.dense", 2),
    "opt": ("model.decoder.layers.#.fc1", "model.decoder.layers.#.fc2", 2),
    "albert": (
        "encoder.albert_layer_groups.#.albert_layers.0.ffn",
        "encoder.albert_layer_groups.#.albert_layers.0.ffn_output",
        1,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    backbone = tiny_backbone(family)
    found = observed(backbone, feed_forwards(backbone), alone=True)
    assert all((place.d_in, place.d_out) == (32, 32) for place in found.values())
    if family in WHOLE:
        assert tuple(found) == WHOLE[family] and not any(place.entry for place in found.values())
    elif family in HALVES:
        first, second, count = HALVES[family]
        assert {place.entry: path for path, place in found.items()} == {
            first.replace("#", str(n)): second.replace("#", str(n)) for n in range(count)
        }
    elif family in ("bart", "whisper"):
        assert [path.split(".")[1] for path in found] == ["encoder", "decoder"]
        assert all(place.entry.endswith("fc1") and path.endswith("fc2") for path, place in found.items())
    else:
        assert family == "mamba2" and not found


def test_attention_is_none_whatever_its_widths() -> None:
    """q, k, v: d -> a and o: a -> d look like a feed-forward layer in numbers."""
    for settings in ({"head_dim": 16, "num_key_value_heads": 4}, {"head_dim": 16}, {"num_key_value_heads": 1}):
        assert tuple(feed_forwards(tiny_backbone("llama", **settings))) == WHOLE["llama"]


def test_a_fused_gate() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up, self.down = nn.Linear(6, 20), nn.Linear(10, 6)

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up, self.down = nn.Linear(6, 30), nn.Linear(10, 6)

    assert feed_forwards(nn.Sequential(Fused(), Other())) == {"0": Place("0", 6, 6)}


def test_torchs_own_blocks() -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    found = feed_forwards(nn.TransformerEncoder(block, 2))
    assert [(place.entry, path) for path, place in found.items()] == [
        (f"layers.{n}.linear1", f"layers.{n}.linear2") for n in range(2)
    ]


@pytest.mark.parametrize(
    ("family", "wanted", "found"),
    [
        ("llama", "middle", ["model.layers.1.mlp"]),
        ("llama", "all", ["model.layers.0.mlp", "model.layers.1.mlp"]),
        ("llama", "layers.0", ["model.layers.0.mlp"]),
        ("llama", ["model.layers.1.mlp", "model.layers.0"], ["model.layers.0.mlp", "model.layers.1.mlp"]),
        ("llama", "mlp", ["model.layers.0.mlp", "model.layers.1.mlp"]),
        ("llama", "*.layers.1.*", ["model.layers.1.mlp"]),
        ("llama", "layers.0.self_attn.q_proj", ["model.layers.0.self_attn.q_proj"]),
        ("t5", "middle", ["decoder.block.0.layer.2.DenseReluDense"]),
        ("t5", "encoder.*", ["encoder.block.0.layer.1.DenseReluDense"]),
        ("t5", "decoder.block.0", ["decoder.block.0.layer.2.DenseReluDense"]),
        ("bert", "intermediate", ["encoder.layer.0.output.dense", "encoder.layer.1.output.dense"]),
        ("bert", "encoder.layer.1.output", ["encoder.layer.1.output.dense"]),
        ("mamba2", "mixer", ["backbone.layers.0.mixer", "backbone.layers.1.mixer"]),
    ],
)
def test_names(family: str, wanted: Any, found: list[str]) -> None:
    assert list(places(tiny_backbone(family), wanted)) == found


def test_the_middle_of_many() -> None:
    for layers, middle in ((1, 0), (3, 1), (4, 2), (5, 2)):
        backbone = tiny_backbone("llama", num_hidden_layers=layers)
        assert list(places(backbone, "middle")) == [f"model.layers.{middle}.mlp"]


def test_what_does_not_fit_is_refused() -> None:
    mamba, llama = tiny_backbone("mamba2"), tiny_backbone("llama")
    with pytest.raises(ValueError, match=r"no feed-forward layers.*'backbone.layers.0.mixer'.*parallel"):
        places(mamba, "middle")
    with pytest.raises(ValueError, match=r"nothing is named 'mpl'; expected 'middle', 'all', .*model.layers.0.mlp"):
        places(llama, "mpl")
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.up_proj lies inside of model.layers.0.mlp"):
        places(llama, ["layers.0", "layers.0.mlp.up_proj"])
    mixer = places(mamba, "layers.0.mixer")
    assert observed(mamba, mixer, alone=False)["backbone.layers.0.mixer"].d_out == 32
    with pytest.raises(IncompatibleExpert, match="called with 1 more argument.*mode='parallel'"):
        observed(mamba, mixer, alone=True)
    for name, fault in (("layers.0.self_attn", "NoneType -> tuple"), ("model.embed_tokens", r"\(2, 5\) ->")):
        with pytest.raises(IncompatibleExpert, match=fault):
            observed(llama, places(llama, name), alone=False)


def test_a_layer_that_is_told_more_than_its_input() -> None:
    """As Bloom's, which adds the residual itself: alone it would be lost, beside it the layer hears of it."""

    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            return self.down(self.up(x)) + residual

    class Untold(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.told = Told()

        def forward(self, x: Tensor) -> Tensor:
            return self.told(x, torch.ones_like(x))

    llama = tiny_backbone("llama")
    llama.get_submodule("model.layers.0").mlp = Untold()
    found = places(llama, "layers.0")
    assert list(observed(llama, found, alone=False)) == ["model.layers.0.mlp.told"]
    with pytest.raises(IncompatibleExpert, match="would ignore"):
        observed(llama, found, alone=True)
