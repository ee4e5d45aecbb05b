"""What PEFT saved is read here with the same logits, and what is published here PEFT opens with the same logits."""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from mixwright.catalog.adapter import LoraFactors
from mixwright.catalog.store import Catalog
from mixwright.ops.digest import tensor_digest

TOKENS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))


def build(kind: str) -> nn.Module:
    torch.manual_seed(3)
    if kind == "gpt2":
        config = GPT2Config(
            n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0
        )
        return GPT2LMHeadModel(config).eval()
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, max_position_embeddings=16, tie_word_embeddings=kind == "tied",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def backbones() -> dict[str, nn.Module]:
    return {kind: build(kind) for kind in ("gpt2", "llama", "tied")}


@contextmanager
def acting(model: nn.Module, factors: Mapping[str, LoraFactors]) -> Iterator[None]:
    """One expert at weight 1, by hooks: the plainest statement of y = W x + scale * up @ down @ x."""

    def hook(factor: LoraFactors) -> Callable[..., torch.Tensor]:
        return lambda _, inputs, output: output + factor.scale * (inputs[0] @ factor.down.T @ factor.up.T)

    handles = [model.get_submodule(path).register_forward_hook(hook(factor)) for path, factor in factors.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def saved(model: nn.Module, folder: Path, config: LoraConfig, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Write a PEFT adapter with random factors; its logits, from PEFT reading what it wrote."""
    adapted = get_peft_model(copy.deepcopy(model), config)
    torch.manual_seed(11)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    if dtype != torch.float32:
        file = folder / "adapter_model.safetensors"
        save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return peft_logits(model, folder)


@torch.no_grad()
def peft_logits(model: nn.Module, folder: Path) -> torch.Tensor:
    return PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()(TOKENS).logits


@torch.no_grad()
def our_logits(model: nn.Module, factors: Mapping[str, LoraFactors]) -> torch.Tensor:
    with acting(model, factors):
        return model(TOKENS).logits


LLAMA = ["q_proj", "v_proj", "down_proj"]
GPT2 = ["c_attn", "c_proj"]
HONOURED: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    "gpt2_conv1d": ("gpt2", {"target_modules": GPT2, "fan_in_fan_out": True}, torch.float32),
    "gpt2_flag_left_to_peft": ("gpt2", {"target_modules": GPT2}, torch.float32),
    "gpt2_conv1d_and_linear": ("gpt2", {"target_modules": [*GPT2, "lm_head"]}, torch.float32),
    "gpt2_one_path": ("gpt2", {"target_modules": ["transformer.h.1.mlp.c_fc"]}, torch.float32),
    "gpt2_no_task_type": ("gpt2", {"target_modules": GPT2, "task_type": None}, torch.float32),
    "rslora": ("llama", {"use_rslora": True, "r": 6, "lora_alpha": 5}, torch.float32),
    "rank_pattern": ("llama", {"rank_pattern": {"q_proj": 3, "layers.1.self_attn.v_proj": 7}}, torch.float32),
    "rank_pattern_first_match": (
        "llama",
        {"rank_pattern": {"layers.0.self_attn.q_proj": 2, "q_proj": 5}},
        torch.float32,
    ),
    "alpha_pattern": ("llama", {"alpha_pattern": {"q_proj": 3, "layers.1.self_attn.v_proj": 40}}, torch.float32),
    "all_patterns_and_rslora": (
        "llama",
        {
            "use_rslora": True,
            "rank_pattern": {"q_proj": 3},
            "alpha_pattern": {"v_proj": 2, "layers.0.mlp.down_proj": 9},
        },
        torch.float32,
    ),
    "all_linear": ("llama", {"target_modules": "all-linear"}, torch.float32),
    "all_linear_gpt2": ("gpt2", {"target_modules": "all-linear"}, torch.float32),
    "excluded": ("llama", {"exclude_modules": ["layers.0.self_attn.q_proj"]}, torch.float32),
    "dropout": ("llama", {"lora_dropout": 0.3}, torch.float32),
    "gaussian": ("llama", {"init_lora_weights": "gaussian"}, torch.float32),
    "tied_head": ("tied", {}, torch.float32),
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}, torch.float32),
    "half": ("llama", {}, torch.float16),
    "bfloat16": ("llama", {}, torch.bfloat16),
    "bfloat16_gpt2": ("gpt2", {"target_modules": GPT2, "fan_in_fan_out": True}, torch.bfloat16),
    **{f"rank_{rank}": ("llama", {"r": rank, "lora_alpha": 2 * rank + 1}, torch.float32) for rank in (1, 2, 13, 64)},
}


@pytest.mark.parametrize("name", HONOURED)
def test_what_peft_saved_gives_the_same_logits(name: str, tmp_path: Path, backbones: dict[str, nn.Module]) -> None:
    kind, settings, dtype = HONOURED[name]
    model = backbones[kind]
    config = LoraConfig(**{"target_modules": LLAMA, "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, **settings})
    wanted = saved(model, tmp_path / "adapter", config, dtype)
    before = tensor_digest(model)
    catalog = Catalog(tmp_path / "catalogue", model)
    catalog.add(tmp_path / "adapter")
    expert = catalog.expert("adapter")
    ours = our_logits(model, expert.factors)
    assert (ours - wanted).abs().max() < 1e-5
    assert (model(TOKENS).logits - wanted).abs().max() > 1e-2  # the adapter does something
    assert tensor_digest(model) == before

    # ... and back: published from the factors, opened by PEFT.
    settings = {
        "task_type": "CAUSAL_LM",
        "fan_in_fan_out": expert.card.fan_in_fan_out,
        "use_rslora": expert.card.rslora,
    }
    catalog.publish("again", expert.factors, peft_config=settings)
    assert (peft_logits(model, catalog.folder / "experts" / "again") - wanted).abs().max() < 1e-5
    again = catalog.expert("again").factors
    assert all(abs(again[path].scale - factor.scale) < 1e-12 for path, factor in expert.factors.items())


def test_names_with_the_adapter_inside_and_without_prefix(tmp_path: Path, backbones: dict[str, nn.Module]) -> None:
    """Older PEFT and other trainers leave the adapter's name in, or the prefix out."""
    model = backbones["llama"]
    wanted = saved(model, tmp_path / "adapter", LoraConfig(target_modules=LLAMA, r=4))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    catalog = Catalog(tmp_path / "catalogue", model)
    for prefix, infix in itertools.product((True, False), ("", ".default")):
        name = f"prefix-{prefix}{infix}"
        changed = {
            (key if prefix else key.removeprefix("base_model.model.")).replace(".weight", f"{infix}.weight"): tensor
            for key, tensor in tensors.items()
        }
        save_file(changed, file)
        catalog.add(tmp_path / "adapter", expert_id=name)
        assert (our_logits(model, catalog.expert(name).factors) - wanted).abs().max() < 1e-5


def test_default_keys_of_every_release_are_accepted(tmp_path: Path, backbones: dict[str, nn.Module]) -> None:
    """The keys that PEFT 0.3 to 0.21 wrote for a plain LoRA, at their defaults."""
    import json

    model = backbones["llama"]
    saved(model, tmp_path / "adapter", LoraConfig(target_modules=LLAMA, r=4))
    file = tmp_path / "adapter" / "adapter_config.json"
    old = {
        "base_model_name_or_path": None, "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "r": 4,
        "init_lora_weights": True, "lora_alpha": 8, "lora_dropout": 0.0, "modules_to_save": None, "peft_type": "LORA",
        "target_modules": LLAMA, "task_type": None,
    }  # fmt: skip
    releases = {
        "0.2": old | {"enable_lora": None, "merge_weights": False},
        "0.3": old,
        "0.4": old | {"layers_pattern": None, "layers_to_transform": None, "revision": None},
        "0.6": old | {"alpha_pattern": {}, "rank_pattern": {}, "auto_mapping": None},
        "0.7": old | {"loftq_config": {}, "megatron_config": None, "megatron_core": "megatron.core"},
        "0.9": old | {"use_rslora": False, "use_dora": False, "layer_replication": None},
        "0.13": old | {"auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "os"}},
        "0.15": old | {"eva_config": None, "exclude_modules": None, "lora_bias": False, "corda_config": None},
        "0.17": old | {"qalora_group_size": 16, "use_qalora": False, "target_parameters": None, "peft_version": "0.17"},
    }
    catalog = Catalog(tmp_path / "catalogue", model)
    for release, config in releases.items():
        file.write_text(json.dumps(config))
        assert catalog.add(tmp_path / "adapter", expert_id=f"release-{release}").rank == 4


def test_a_pool_that_differs_in_rank_alpha_and_targets(tmp_path: Path, backbones: dict[str, nn.Module]) -> None:
    model = backbones["llama"]
    catalog = Catalog(tmp_path / "catalogue", model)
    configs = {
        "a": LoraConfig(target_modules=["q_proj"], r=2, lora_alpha=1),
        "b": LoraConfig(target_modules=["down_proj", "up_proj"], r=5, lora_alpha=30, use_rslora=True),
        "c": LoraConfig(target_modules="all-linear", r=1),
    }
    wanted = {name: saved(model, tmp_path / name, config) for name, config in configs.items()}
    for name in configs:
        catalog.add(tmp_path / name)
    for name in catalog.ids():
        assert (our_logits(model, catalog.expert(name).factors) - wanted[name]).abs().max() < 1e-5
    assert catalog.check() and all(finding.level == "warning" for finding in catalog.check())


FEATURES: dict[str, Any] = {
    "use_dora": True, "init_lora_weights": "pissa", "modules_to_save": ["lm_head"], "bias": "all",
    "layers_to_transform": [0], "lora_bias": True,
}  # fmt: skip


@pytest.mark.parametrize("feature", FEATURES)
def test_features_that_peft_saves_are_refused(feature: str, tmp_path: Path, backbones: Any) -> None:
    from mixwright.errors import CatalogError

    saved(
        backbones["llama"], tmp_path / "adapter", LoraConfig(target_modules=LLAMA, r=4, **{feature: FEATURES[feature]})
    )
    with pytest.raises(CatalogError, match=f"^FEATURE .*{feature}"):
        Catalog(tmp_path / "catalogue").add(tmp_path / "adapter")
