"""A tiny config with the shape of a real one: every kind of layer and every switch kept, sizes cut down.

Nothing here knows a family. Fields are recognised by what their names say (widths, heads, counts, windows), lists with
one entry per layer are cut to layers that show every combination of kinds, and ids of special tokens are moved into
the small vocabulary. `_SETTINGS` holds what a name can't tell, values only.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mixwright.backbones.layer_fields import LAYER_COUNTS, cut_list, is_by_layer, is_index_list, is_int, layers_of

LAYERS = 4
VOCAB = 96
_WIDTH, _HEADS, _HEAD_DIM = 32, 4, 8

# The first pattern that fits a field's whole name says how small it gets; a smaller value is kept.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"mamba_(n_|num_)?heads|n_mamba_heads", 8),
    (r".*(attention_heads|num_heads|n_heads|_heads)|n_head|num_query_groups", _HEADS),
    (r"qk_head_dim|attention_head_dim", 2 * _HEAD_DIM),
    (r".*(head_?dim|d_head|dim_head|head_size|kv_channels|rotary_dim)", _HEAD_DIM),
    (r"mamba_d_ssm|.*hidden_size_mlp|mamba_intermediate_size", 2 * _WIDTH),
    (r"dim_model_base|model_dim|hidden_dim|projection_dim|width", _WIDTH),
    (
        r".*(intermediate_size|ffn_dim|ffn_hidden_size|feed_forward_size|ffn_size|mid_dim)|d_inner|dim_ff|dff|n_inner",
        48,
    ),
    (r".*(lora_rank|lowrank|_rank|dt_rank)", 8),
    (r".*(vocab_size|vocab_size_base|_group_vocab|vocab_size_per_layer_input|num_centroids)", VOCAB),
    (r".*(state_size|d_state)", 8),
    (r".*(routed_experts|local_experts|num_experts|zero_expert_num)", 4),
    (r".*(experts_per_tok|experts_per_token|moe_topk|moe_k|top_k_experts)", 2),
    (r".*(n_group|topk_group|expert_group|o_groups|n_groups|ngroups)", 1),
    (r".*(shared_experts)", 1),
    (r".*(chunk_size|chunk_length|block_size|window_size|sliding_window|window_len|window|index_topk)", 8),
    (r".*(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions|context_length)", 256),
    (r".*(max_source_positions|rel_extent|max_length|mem_len)", 64),
    (r".*(index_topk_blocks|split_ngram_parts|num_mem_blocks|divisible_by|num_random_blocks|H_cycles|L_cycles)", 2),
    (r".*(period|interval|pattern|every_n_layers|layer_group_size|per_attn_res_block)", 2),
    (r".*(layer_offset|first_k_dense_replace|num_dense_layers|num_kv_shared_layers|start_index)", 1),
    (r"image_size", 16),
    (r"patch_size", 8),
)
_PLAIN = tuple((re.compile(pattern), value) for pattern, value in _SIZES)
_WIDTHS = re.compile(
    r".*(hidden_size|d_model|n_embd|emb_dim|embedding_dim|embedding_size|embed_dim|lru_width|proj_dim)"
)
_KEY_HEADS = re.compile(r".*(num|n)_(kv|key_value)_heads|num_key_value_groups")
_TOKEN = re.compile(r".*(token_id|token_index|mask_index|unk_index|pad_index|bos_index|eos_index)s?")
_UNCHANGED = frozenset({"chunk_size_feed_forward", "chunk_size_lm_head", "pretraining_tp", "type_vocab_size", "expand"})

_FEW_HEADS = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8}
_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    # Sizes that are bound to others by a product.
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "big_bird": {"attention_type": "original_full"},
    "reformer": {"axial_pos_embds": False},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "dots3_note_text": {"head_dim": 16, "per_layer_config": {}},
    # Defaults of which a model can't be made, or that leave out half of the family's kinds of layers.
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "qwen4_exp_text": {**_FEW_HEADS, "indexer_budget": 8, "indexer_compress_ratio": 2, "output_gate_type": "sigmoid"},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "xmod": {"default_language": "en_XX"},
    "hrm_text": {"num_layers_per_stack": 4, "num_hidden_layers": 24},
}
"""Model type -> settings that its fields' names don't give away: values only, never behaviour."""


def shrunk(settings: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """The settings of a model of `model_type` (a config's fields) with every size cut down to tiny."""
    return _shrunk({**settings, "model_type": model_type})


def representative(settings: Mapping[str, Any], layers: int, count: int = LAYERS) -> list[int]:
    """`count` of the layers, taken in turn from every kind that lists with one entry per layer tell apart."""
    columns = _columns(settings, layers)
    kinds: dict[tuple[str, ...], list[int]] = {}
    for layer in range(layers):
        kinds.setdefault(tuple(column[layer] for column in columns), []).append(layer)
    order = [kind[turn] for turn in range(layers) for kind in kinds.values() if turn < len(kind)]
    return order[:count]


def _shrunk(settings: Mapping[str, Any]) -> dict[str, Any]:
    layers = layers_of(settings)
    kept = representative(settings, layers) if layers else []
    tiny = {name: _cut(name, value, settings, layers, kept) for name, value in settings.items()}
    return _merged(tiny, _SETTINGS.get(str(settings.get("model_type")), {}))


def _cut(name: str, value: Any, settings: Mapping[str, Any], layers: int, kept: Sequence[int]) -> Any:
    if isinstance(value, Mapping):
        if value and all(str(key).isdigit() for key in value) and name.endswith("layer_config"):
            return {place: _shrunk(value[key]) for key in value for place, at in enumerate(kept) if int(key) == at}
        if not name.endswith(("config", "encoder", "decoder")):
            return dict(value)
        # A tower of as many layers as the text has would be found in its place; in no real model are there as many.
        small = _shrunk(value)
        tower = "text" not in name and not name.endswith(("encoder", "decoder"))
        return {**small, **{key: LAYERS - 1 for key in LAYER_COUNTS if tower and is_int(small.get(key))}}
    if isinstance(value, (list, tuple)):
        return _cut_list(name, list(value), settings, layers, kept)
    if name == "is_decoder":
        return True
    if value is None and name in ("head_dim", "num_key_value_heads"):
        return _HEAD_DIM if name == "head_dim" else _HEADS // 2
    return _size(name, value, settings) if isinstance(value, int) and is_int(value) else value


def _cut_list(name: str, value: list[Any], settings: Mapping[str, Any], layers: int, kept: Sequence[int]) -> list[Any]:
    sized = [_size(name, item, settings) if is_int(item) else item for item in value]
    if name.endswith("token_id"):
        return sized
    return cut_list(name, sized if is_by_layer(name, value, layers) else value, layers, kept)


def _size(name: str, value: int, settings: Mapping[str, Any]) -> int:
    if name in _UNCHANGED or value <= 0:
        return value
    if name in LAYER_COUNTS:
        return LAYERS
    if _TOKEN.fullmatch(name):
        return value if value < 8 else 3 + value % 5
    if _KEY_HEADS.fullmatch(name):
        whole = any(settings.get(other) == value for other in ("num_attention_heads", "n_head", "num_heads"))
        return _HEADS if whole else min(value, _HEADS // 2)
    if _WIDTHS.fullmatch(name):
        width = settings.get("hidden_size")
        times = value // width if is_int(width) and width and value % width == 0 else 1
        return _WIDTH * min(times, 4)
    return next((min(value, small) for pattern, small in _PLAIN if pattern.fullmatch(name)), value)


def _columns(settings: Mapping[str, Any], layers: int) -> list[list[str]]:
    columns: list[list[str]] = []
    for name, value in settings.items():
        if isinstance(value, (list, tuple)) and is_index_list(name, value, layers):
            columns.append([str(layer in value) for layer in range(layers)])
        elif isinstance(value, (list, tuple)) and is_by_layer(name, value, layers):
            columns.append([str(item) for item in value])
    return columns


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    deeper = {
        name: _merged(below[name], value)
        for name, value in above.items()
        if isinstance(value, Mapping) and isinstance(below.get(name), Mapping)
    }
    return {**below, **above, **deeper}
