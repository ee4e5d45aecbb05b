"""Some of a model's layers as a model of their own: what is left of a component when a hybrid is discretised.

Layers must not merely be skipped: lengths of caches and masks are read from the layers' caches, and those of a skipped
layer stay empty. So the copy has fewer layers, renumbered, and a config that says so. Whether the config can say it is
tested by building the copy from it once more, without memory, and comparing part by part.
"""

import copy
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from mixwright.backbones.layer_fields import cut_fields, is_int
from mixwright.backbones.parts import parts_of
from mixwright.errors import IncompatibleExpert

_NUMBERS = ("layer_idx", "layer_id", "layer_number", "block_idx")
_PLAIN = (int, float, str, bool, type(None))


def pruned(model: nn.Module, layers: Sequence[int]) -> nn.Module:
    """A copy of `model` with only these layers, in this order; its tensors are the original's own.

    Nothing of the original is changed. The copy decodes with a cache, and can be saved and loaded by itself. Raises
    ValueError for numbers that name no layer, and IncompatibleExpert (PRUNE) for a family whose config can't describe
    these layers alone, or that can't run them.
    """
    parts = parts_of(model)
    kept = _checked(layers, parts.num_layers)
    small = copied(model)
    if len(kept) == parts.num_layers:
        return small
    name = type(model).__name__
    old = _cut_config(small, kept, name)
    paths = _cut_lists(small, parts.layers, kept, old)
    _as_described(small, paths, kept, name)
    _check_decoding(small, kept, name)
    return small


def _checked(layers: Sequence[int], count: int) -> list[int]:
    kept = list(layers)
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= count:
        raise ValueError(
            f"layers to keep are {kept}; expected at least one of 0 to {count - 1}, in order and once each."
        )
    return kept


def copied(model: nn.Module) -> nn.Module:
    """New modules around the same tensors."""
    tensors = chain(model.parameters(), model.buffers(), _loose_tensors(model))
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _loose_tensors(model: nn.Module) -> list[Tensor]:
    return [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]


def _cut_config(model: nn.Module, kept: Sequence[int], name: str) -> dict[str, Any]:
    """Let the config speak of the layers `kept` only; what its fields were."""
    config: Any = model.config
    text = config.get_text_config()
    fields = copy.copy(vars(text))
    try:
        for field, value in cut_fields(fields, kept).items():
            setattr(text, field, value)
    except Exception as error:  # configs check their fields in their own ways
        raise _refused(name, kept, f"its config can't describe them ({_short(error)})") from error
    return fields


def _cut_lists(small: nn.Module, path: str, kept: Sequence[int], old: Mapping[str, Any]) -> tuple[str, ...]:
    """Cut the list of layers and those beside it (XLM keeps attentions and feed-forwards apart); their paths."""
    above = path.rpartition(".")[0]
    parent, count = small.get_submodule(above), len(small.get_submodule(path))  # type: ignore[arg-type]
    lists = {key: it for key, it in parent.named_children() if isinstance(it, nn.ModuleList) and len(it) == count}
    for key, whole in lists.items():
        setattr(parent, key, nn.ModuleList([whole[layer] for layer in kept]))
        for place, layer in enumerate(kept):
            _renumber(whole[layer], layer, place, small.config.get_text_config(), old)  # type: ignore[union-attr]
    return tuple(f"{above}.{key}.".lstrip(".") for key in lists)


def _renumber(layer: nn.Module, number: int, place: int, config: Any, old: Mapping[str, Any]) -> None:
    """Tell a layer its place now, and what it copied from the config on the whole of the layers."""
    for module in layer.modules():
        for attribute, value in list(vars(module).items()):
            if attribute in _NUMBERS and value == number:
                setattr(module, attribute, place)
            elif attribute in old and value == old[attribute] and (is_int(value) or _plain_list(value)):
                setattr(module, attribute, getattr(config, attribute))


def _as_described(small: nn.Module, paths: tuple[str, ...], kept: Sequence[int], name: str) -> None:
    """Compare the copy with what its config alone builds, and take over what the model counts outside its layers."""
    config: Any = small.config
    try:
        with torch.device("meta"):
            built = type(small)(type(config).from_dict(config.to_dict()))
    except Exception as error:  # families check their configs in their own ways
        raise _refused(name, kept, f"no model can be made of the config that is left ({_short(error)})") from error
    shapes = {key: tuple(value.shape) for key, value in small.state_dict(keep_vars=True).items()}
    wanted = {key: tuple(value.shape) for key, value in built.state_dict(keep_vars=True).items()}
    if shapes != wanted:
        first = next(key for key in sorted({*shapes, *wanted}) if shapes.get(key) != wanted.get(key))
        raise _refused(
            name, kept, f"its config would give {first} the shape {wanted.get(first)}, not {shapes.get(first)}"
        )
    others = dict(built.named_modules())
    for place, module in small.named_modules():
        for attribute, value in _plain(others.get(place)).items():
            mine = _plain(module).get(attribute, value)
            if mine == value:
                continue
            if place.startswith(paths):
                raise _refused(name, kept, f"its config would make {place}.{attribute} {value!r}, not {mine!r}")
            setattr(module, attribute, value)
    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
        if hasattr(built, attribute):
            setattr(small, attribute, getattr(built, attribute))


def _plain(module: nn.Module | None) -> dict[str, Any]:
    """The numbers, words and switches of a module that say how it computes."""
    values = vars(module) if module is not None else {}
    passing = ("training", "gradient_checkpointing")
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in values.items()
        if not key.startswith("_") and key not in passing and (isinstance(value, _PLAIN) or _plain_list(value))
    }


def _plain_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, _PLAIN) for item in value)


def _check_decoding(small: nn.Module, kept: Sequence[int], name: str) -> None:
    """Decode two tokens: families that read the length of a sequence off an attention layer fail without one."""
    anchor = next(small.parameters())
    ids = torch.tensor([[0]], device=anchor.device)
    modes = [module for module in small.modules() if module.training]
    small.eval()
    try:
        with torch.no_grad():
            cache = {}
            for _ in range(2):
                output = small(ids, use_cache=True, **cache)
                cache = {
                    key: value
                    for key in ("past_key_values", "cache_params", "state")
                    if (value := getattr(output, key, None)) is not None
                }
    except Exception as error:  # a foreign model's forward
        raise _refused(name, kept, f"they can't decode by themselves ({_short(error)})") from error
    finally:
        for module in modes:
            module.training = True


def _refused(name: str, kept: Sequence[int], reason: str) -> IncompatibleExpert:
    return IncompatibleExpert(
        "PRUNE",
        name,
        f"layers {', '.join(map(str, kept))} alone are no model of this family: {reason}. Keep other layers (with at "
        "least one of each kind, in the period that the config describes), or keep the component whole.",
    )


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
