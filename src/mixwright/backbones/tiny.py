"""Tiny random backbones of many families, for tests and demos: transformers configs at pico size, no download."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from mixwright.backbones.hf import build_backbone

_WIDTH, _HEADS, _VOCAB = 32, 4, 264

_LLAMA: dict[str, Any] = {
    "vocab_size": _VOCAB,
    "hidden_size": _WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_BERT: dict[str, Any] = {
    "vocab_size": _VOCAB,
    "hidden_size": _WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": _HEADS,
    "max_position_embeddings": 512,
}
_BART: dict[str, Any] = {
    "vocab_size": _VOCAB,
    "d_model": _WIDTH,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": _HEADS,
    "decoder_attention_heads": _HEADS,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
_SPECIAL: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}

FAMILIES: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "t5": (
        "t5",
        "seq2seq",
        {"vocab_size": _VOCAB, "d_model": _WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": _HEADS}
        | {"feed_forward_proj": "gated-gelu", "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
    ),
    "gpt2": (
        "gpt2",
        "causal",
        {"vocab_size": _VOCAB, "n_embd": _WIDTH, "n_layer": 2, "n_head": _HEADS, "n_positions": 512, **_SPECIAL},
    ),
    "gpt_neox": ("gpt_neox", "causal", {**_LLAMA, **_SPECIAL}),
    "llama": ("llama", "causal", {**_LLAMA, **_SPECIAL}),
    "qwen3": ("qwen3", "causal", {**_LLAMA, "head_dim": 8, "tie_word_embeddings": True, **_SPECIAL}),
    "gemma": ("gemma", "causal", {**_LLAMA, "head_dim": 8, **_SPECIAL}),
    "mistral": ("mistral", "causal", {**_LLAMA, "sliding_window": 64, **_SPECIAL}),
    "bert": ("bert", "encoder", _BERT),
    "vit": (
        "vit",
        "encoder",
        {"hidden_size": _WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": _HEADS}
        | {"image_size": 16, "patch_size": 8, "num_channels": 3},
    ),
    "opt": (
        "opt",
        "causal",
        {"vocab_size": _VOCAB, "hidden_size": _WIDTH, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"word_embed_proj_dim": 24, "max_position_embeddings": 512, **_SPECIAL},
    ),
    "falcon": (
        "falcon",
        "causal",
        {"vocab_size": _VOCAB, "hidden_size": _WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, **_SPECIAL},
    ),
    "phi": ("phi", "causal", {**_LLAMA, "num_key_value_heads": 4, **_SPECIAL}),
    "gemma3": ("gemma3_text", "causal", {**_LLAMA, "head_dim": 8, **_SPECIAL}),
    "mixtral": ("mixtral", "causal", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, **_SPECIAL}),
    "mamba2": (
        "mamba2",
        "causal",
        {"vocab_size": _VOCAB, "hidden_size": _WIDTH, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8}
        | {"head_dim": 8, "expand": 2, "n_groups": 1, "chunk_size": 8, **_SPECIAL},
    ),
    "bart": ("bart", "seq2seq", {**_BART, **_SPECIAL, "decoder_start_token_id": 1, "forced_eos_token_id": None}),
    "distilbert": (
        "distilbert",
        "encoder",
        {"vocab_size": _VOCAB, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    ),
    "roberta": ("roberta", "encoder", {**_BERT, "pad_token_id": 1}),
    "albert": ("albert", "encoder", {**_BERT, "embedding_size": 16}),
    "whisper": (
        "whisper",
        "speech",
        {**_BART, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 64, **_SPECIAL}
        | {"decoder_start_token_id": 2},
    ),
}
"""Family name -> (transformers model type, kind, settings)."""


def tiny_backbone(family: str, *, seed: int = 0, **settings: Any) -> nn.Module:
    """A model of `family` with random weights from `seed`; `settings` replace those of its tiny config.

    Raises ValueError for a family that is not in `FAMILIES`.
    """
    if family not in FAMILIES:
        raise ValueError(f"no tiny backbone {family!r}; there are {', '.join(FAMILIES)}.")
    model_type, kind, tiny = FAMILIES[family]
    return build_backbone(model_type, {**tiny, **settings}, kind=kind, seed=seed)
