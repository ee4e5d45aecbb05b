"""Models are cut without knowing their family, and what can't be cut is refused with what was seen."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mixwright.backbones.parts import parts_of, split
from mixwright.errors import IncompatibleExpert


@given(st.integers(1, 200), st.data())
def test_runs_cover_each_layer_once_and_differ_by_one_at_most(layers: int, data: Any) -> None:
    blocks = data.draw(st.integers(1, layers))
    runs = split(layers, blocks)
    assert [layer for run in runs for layer in run] == list(range(layers))
    lengths = {len(run) for run in runs}
    assert len(runs) == blocks
    assert min(lengths) >= 1
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("blocks", [0, 3])
def test_a_block_without_layers_is_refused(blocks: int) -> None:
    with pytest.raises(ValueError, match="expected 1 to 2"):
        split(2, blocks)


@pytest.mark.parametrize(
    ("family", "layers", "widths", "cache"),
    [
        ("gpt_neox", "gpt_neox.layers", (32, 32, 32), "past_key_values"),
        ("gpt2", "transformer.h", (32, 32, 32), "past_key_values"),
        ("opt", "model.decoder.layers", (32, 32, 24), "past_key_values"),
        ("mamba2", "backbone.layers", (32, 32, 32), "cache_params"),
        ("jamba", "model.layers", (32,) * 5, "past_key_values"),
        ("rwkv", "rwkv.blocks", (32, 32, 32), None),
        ("bloom", "transformer.h", (32, 32, 32), "past_key_values"),
    ],
)
def test_parts_are_found(family: str, layers: str, widths: tuple[int, ...], cache: str | None, tiny: Any) -> None:
    model = tiny(family)
    parts = parts_of(model)
    assert (parts.layers, parts.widths, parts.cache_name, parts.vocab_size) == (layers, widths, cache, 264)
    assert model.get_submodule(parts.head) is model.get_output_embeddings()
    assert model.get_submodule(parts.embedding) is model.get_input_embeddings()


def test_looking_leaves_the_model_and_the_generator_as_they_were(tiny: Any) -> None:
    model = tiny("gpt2").train()
    model.transformer.h[0].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    parts_of(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma3n_text", r"one stream of shape .* came as \(4, 1, 2, 32\)"),
        ("t5", "encoder-decoder"),
        ("bert", "get_output_embeddings"),
    ],
)
def test_what_can_not_be_cut_is_refused(family: str, reason: str, tiny: Any) -> None:
    with pytest.raises(IncompatibleExpert, match=f"CUT mine: .*{reason}"):
        parts_of(tiny(family), "mine")


class Odd(nn.Module):
    """A model whose forward visits its layers in an order of its own."""

    def __init__(self, order: list[int], width: int = 4) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=2, get_text_config=lambda: SimpleNamespace(num_hidden_layers=2))
        self.order = order
        self.embedding, self.layers = nn.Embedding(9, width), nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.head = nn.Linear(width, 9)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor) -> Any:
        x = self.embedding(input_ids)
        for place in self.order:
            x = self.layers[place](x)
        return SimpleNamespace(logits=self.head(x))


def test_layers_out_of_order_or_run_twice_are_refused() -> None:
    assert parts_of(Odd([0, 1])).num_layers == 2
    for order in ([1, 0], [0, 1, 1], [0]):
        with pytest.raises(IncompatibleExpert, match="not entered once each and in order"):
            parts_of(Odd(order))
    with pytest.raises(IncompatibleExpert, match="fails on two tokens"):
        parts_of(Odd([0, 7]))


def test_a_model_without_a_list_of_its_layers_is_refused() -> None:
    model = Odd([0, 1])
    model.layers = nn.ModuleList([*model.layers, nn.Linear(4, 4)])
    with pytest.raises(IncompatibleExpert, match="no list of its 2 layers"):
        parts_of(model)
