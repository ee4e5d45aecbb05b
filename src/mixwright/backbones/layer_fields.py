"""What a config says layer by layer, cut to some of the layers: no family is known here, only how such fields look.

A config tells layers apart by lists with one entry per layer (`layer_types`), by lists of layers' numbers
(`attn_layer_indices`), by objects keyed by layers' numbers, by patterns that repeat (`block_types`, `attention_types`),
by a period and an offset, or by how many layers come first or last.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

LAYER_COUNTS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers", "encoder_layers"),
    *("num_decoder_layers", "num_encoder_layers", "depth"),
)
_KINDS = ("layer_types", "layers_block_type")
_INDICES = re.compile(r".*(layer|attn|block|moe|mlp).*(ids|idxs|idx|indices|index|layers)")
_BY_LAYER = re.compile(r".*(layer|block|sparsity|intermediate|rope|attn|attention|mlp|moe).*")
_REPEATED = re.compile(r".*block_types?")
_FIRST = re.compile(r"first_k_dense_replace|num_dense_layers|max_window_layers|.*layer_start_index")
_LAST = re.compile(r"num_kv_shared_layers")


def is_int(value: Any) -> bool:
    """Whether a config's value is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def layers_of(settings: Mapping[str, Any]) -> int:
    """How many layers the fields of a config speak of; 0 where they don't say."""
    counted = next((settings[name] for name in LAYER_COUNTS if is_int(settings.get(name))), 0)
    return counted or next((len(settings[name]) for name in _KINDS if isinstance(settings.get(name), list)), 0)


def is_index_list(name: str, value: Sequence[Any], layers: int) -> bool:
    """Whether a field lists numbers of layers (`attn_layer_indices`)."""
    numbers = all(is_int(item) and 0 <= item < layers for item in value)
    return bool(_INDICES.fullmatch(name)) and numbers and len(set(value)) == len(value)


def is_by_layer(name: str, value: Sequence[Any], layers: int) -> bool:
    """Whether a field has one entry per layer."""
    named = all(isinstance(item, str) for item in value) or bool(_BY_LAYER.fullmatch(name))
    return named and len(value) == layers > 0


def cut_fields(settings: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The fields that change when only the layers `kept` remain, in this order, with their values then."""
    layers = layers_of(settings)
    cut = {name: _cut(name, value, layers, kept) for name, value in settings.items()}
    return _periods(settings, kept) | {name: cut[name] for name, value in settings.items() if cut[name] != value}


def _cut(name: str, value: Any, layers: int, kept: Sequence[int]) -> Any:
    if isinstance(value, Mapping):
        numbered = name.endswith("layer_config") and all(str(key).isdigit() for key in value)
        return {at: value[key] for at, i in enumerate(kept) for key in value if int(key) == i} if numbered else value
    if isinstance(value, (list, tuple)):
        return cut_list(name, list(value), layers, kept)
    if not is_int(value):
        return value
    if name in LAYER_COUNTS and value == layers:
        return len(kept)
    if _FIRST.fullmatch(name):
        return sum(layer < value for layer in kept)
    return sum(layer >= layers - value for layer in kept) if _LAST.fullmatch(name) else value


def cut_list(name: str, value: list[Any], layers: int, kept: Sequence[int]) -> list[Any]:
    """One list of a config, for the layers `kept` out of `layers`; a list that does not speak of layers stays."""
    if is_index_list(name, value, layers):
        return [place for place, layer in enumerate(kept) if layer in value]
    if is_by_layer(name, value, layers):
        return [value[layer] for layer in kept]
    if _REPEATED.fullmatch(name) and 0 < len(value) < layers:
        return [value[layer % len(value)] for layer in kept]
    runs = all(
        isinstance(item, (list, tuple)) and len(item) == 2 and isinstance(item[0], (list, tuple)) for item in value
    )
    if value and runs and all(is_int(item[1]) for item in value):
        whole = list(chain.from_iterable(list(kinds) * times for kinds, times in value))
        return [[[whole[layer] for layer in kept], 1]] if len(whole) == layers else value
    return value


def _periods(settings: Mapping[str, Any], kept: Sequence[int]) -> dict[str, int]:
    """New periods and offsets under which the layers `kept` are of the kinds that they were, where there are any."""
    found: dict[str, int] = {}
    for name, period in settings.items():
        offset_name = name.replace("period", "offset")
        offset = settings.get(offset_name)
        if not name.endswith("period") or not (is_int(period) and is_int(offset)):
            continue
        kinds = [layer % period == offset for layer in kept]
        tried = ((p, o) for p in range(1, len(kept) + 2) for o in range(p))
        fits = next(((p, o) for p, o in tried if [i % p == o for i in range(len(kept))] == kinds), None)
        if fits is not None:
            found |= {name: fits[0], offset_name: fits[1]}
    return found
