"""Families at hand as tiny models: from their defaults or a folder's config, and every kind of layer kept."""

import json
from pathlib import Path

import pytest
import torch

from mixwright.backbones.family import family_of, tiny_of
from mixwright.backbones.hf import causal_families, default_settings
from mixwright.backbones.shrink import shrunk


@pytest.mark.parametrize("family", ["gpt_neox", "bloom", "deepseek_v3", "zamba2", "qwen3_5_moe", "falcon_mamba", "mpt"])
def test_a_family_is_made_tiny_from_its_defaults(family: str) -> None:
    model = tiny_of(family)
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()
    again = tiny_of(family)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_folders_config_keeps_its_switches_and_kinds_of_layers(tmp_path: Path) -> None:
    layers = ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"] * 6
    written = {"model_type": "qwen3", "num_hidden_layers": 12, "layer_types": layers, "sliding_window": 4096}
    written |= {"hidden_size": 2048, "tie_word_embeddings": True, "attention_bias": True, "eos_token_id": 151645}
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert family_of(tmp_path) == "qwen3"
    config = tiny_of(tmp_path).config
    assert set(config.layer_types) == {"sliding_attention", "full_attention"} and config.num_hidden_layers == 4
    assert config.tie_word_embeddings and config.attention_bias and config.hidden_size == 32
    assert 0 <= config.eos_token_id < config.vocab_size


def test_ratios_that_matter_are_kept() -> None:
    assert shrunk(default_settings("rwkv"), "rwkv")["attention_hidden_size"] == 32
    assert shrunk(default_settings("zamba"), "zamba")["attention_hidden_size"] == 64
    whole, grouped = (shrunk(default_settings(family), family) for family in ("deepseek_v3", "llama4_text"))
    assert whole["num_key_value_heads"] == whole["num_attention_heads"]
    assert grouped["num_key_value_heads"] < grouped["num_attention_heads"]


@pytest.mark.parametrize(("name", "near"), [("gptneox", "gpt_neox"), ("mamba-2", "mamba2"), ("Lama", "llama")])
def test_a_name_that_is_none_is_told_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=near) as caught:
        family_of(name)
    assert len(str(caught.value).splitlines()) == 1


def test_what_cannot_be_made_tiny_says_why() -> None:
    with pytest.raises(ValueError, match="no tiny model of musicgen can be made"):
        tiny_of("musicgen")
    with pytest.raises(ValueError, match="no family"):
        family_of("nothing-like-it-at-all-0815")
    assert len(causal_families()) > 100
