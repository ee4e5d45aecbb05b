"""Backbones from folders: what is loaded, what is refused, and that a folder is never more than data."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mixwright.backbones.hf import build_backbone, byte_tokenizer, load_backbone, load_tokenizer, provenance
from mixwright.backbones.tiny import FAMILIES, tiny_backbone
from mixwright.errors import CatalogError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_backbone("llama").save_pretrained(tmp_path)
    return tmp_path


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def same_weights(one: torch.nn.Module, two: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


@pytest.mark.parametrize("family", ["t5", "gpt2", "llama", "bert", "vit", "whisper", "mamba2"])
def test_a_saved_backbone_loads_as_what_it_was(family: str, tmp_path: Path) -> None:
    backbone = tiny_backbone(family)
    backbone.save_pretrained(tmp_path)
    loaded = load_backbone(tmp_path)
    assert type(loaded) is type(backbone)
    assert not loaded.training
    assert same_weights(loaded, backbone)
    assert provenance(loaded)["path"] == str(tmp_path)


def test_a_config_with_floats_that_json_lacks_loads(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 32, "state_size": 4, "head_dim": 8}
    saved = build_backbone("mamba2", {**sizes, "num_heads": 4, "n_groups": 1, "expand": 2}, kind="causal")
    saved.save_pretrained(tmp_path)
    assert "__float__" in (tmp_path / "config.json").read_text()
    loaded = load_backbone(tmp_path)
    assert loaded.config.time_step_limit[1] == float("inf")
    assert same_weights(loaded, saved)


def test_dtype_and_kind(folder: Path) -> None:
    assert load_backbone(folder, dtype="bfloat16").dtype is torch.bfloat16
    assert load_backbone(folder, dtype=torch.float64).dtype is torch.float64
    assert type(load_backbone(folder, kind="encoder")).__name__ == "LlamaModel"
    with pytest.raises(ValueError, match="backbone kind 'decoder'"):
        load_backbone(folder, kind="decoder")
    with pytest.raises(ValueError, match="dtype 'float31'"):
        load_backbone(folder, dtype="float31")


@pytest.mark.parametrize(
    "fields",
    [
        {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}},
        {"_attn_implementation": "evil/kernel"},
        {"_attn_implementation_internal": "evil/kernel"},
        {"attn_implementation": "evil/kernel"},
        {"trust_remote_code": True},
        {"use_kernels": True, "kernel_config": {"evil": "evil/kernel"}},
    ],
)
def test_fields_that_name_code_are_dropped(folder: Path, fields: dict[str, Any]) -> None:
    (folder / "evil.py").write_text("raise SystemExit('code of the folder was run')")
    edit(folder, **fields)
    loaded = load_backbone(folder)
    assert loaded.config._attn_implementation in ("sdpa", "eager")
    assert not hasattr(loaded.config, "auto_map")
    assert same_weights(loaded, tiny_backbone("llama"))


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"model_type": "evil"}, "CONFIG"),
        ({"model_type": ["llama"]}, "CONFIG"),
        ({"hidden_size": "wide"}, "CONFIG"),
        ({"hidden_size": 64}, "SHAPE"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "FEATURE"),
        ({"num_hidden_layers": 3}, "INCOMPLETE"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder: Path, fields: dict[str, Any], code: str) -> None:
    edit(folder, **fields)
    with pytest.raises(CatalogError) as refusal:
        load_backbone(folder)
    assert refusal.value.code == code


def test_pickled_weights_are_not_opened(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "elsewhere")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CatalogError, match="FORMAT .*pytorch_model.bin, which is a pickle and is not opened. Convert"):
        load_backbone(folder)


def test_an_index_may_not_lead_outside(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CatalogError, match="^FORMAT"):
        load_backbone(folder)


@pytest.mark.parametrize(
    ("name", "code"),
    [("./nowhere", "PATH"), ("/nowhere/at/all", "PATH"), ("no-such-user/no-such-model", "PATH")],
)
def test_a_missing_backbone_says_so(name: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CatalogError) as refusal:
        load_backbone(name)
    assert refusal.value.code == code
    assert name in str(refusal.value)


def test_an_adapter_is_no_backbone(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CatalogError, match="this is an adapter"):
        load_backbone(folder)


def test_a_folder_without_config_or_with_a_broken_one(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(CatalogError, match="^JSON"):
        load_backbone(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CatalogError, match="^PATH"):
        load_backbone(folder)


def test_random_weights_depend_on_the_seed_only() -> None:
    state = torch.random.get_rng_state()
    assert same_weights(tiny_backbone("gpt2", seed=4), tiny_backbone("gpt2", seed=4))
    assert not same_weights(tiny_backbone("gpt2", seed=4), tiny_backbone("gpt2", seed=5))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_unknown_families_are_named() -> None:
    with pytest.raises(ValueError, match="no tiny backbone 'lama'; there are t5"):
        tiny_backbone("lama")
    with pytest.raises(CatalogError, match="^CONFIG"):
        build_backbone("lama", {})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tiny_backbone_is_tiny(family: str) -> None:
    assert sum(p.numel() for p in tiny_backbone(family).parameters()) < 120_000


def test_byte_tokenizer_round_trips(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer("causal")
    texts = ["naïve <s> \n\tcode();", "日本語", ""]
    rows = tokenizer(texts)["input_ids"]
    assert [tokenizer.decode(row) for row in rows] == texts
    assert len(rows[1]) == 9
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("ab")["input_ids"] == tokenizer("ab")["input_ids"] == [68, 69]
    assert byte_tokenizer("seq2seq")("ab")["input_ids"] == [68, 69, 1]
    assert byte_tokenizer("encoder")("ab")["input_ids"] == [2, 68, 69, 1]


def test_a_missing_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="^PATH"):
        load_tokenizer(tmp_path)
