"""What a model remembers of a text while it decodes: bytes that grow with every token, and bytes that do not."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixwright.backbones.eval_mode import eval_mode

_SHORT, _LONG = 4, 8


@dataclass(frozen=True)
class LayerState:
    """Of one layer, for one text: `per_token` bytes for each of at most `window` tokens, and `constant` bytes."""

    per_token: int
    constant: int
    window: int | None = None

    def bytes(self, tokens: int) -> int:
        """After so many tokens."""
        return self.constant + self.per_token * (tokens if self.window is None else min(tokens, self.window))


def decode_state(model: nn.Module) -> tuple[LayerState, ...]:
    """The state of every layer, as the model's own cache has it after two short texts; empty where it keeps none."""
    short_sizes, long_sizes = _sizes(_cache(model, _SHORT)), _sizes(_cache(model, _LONG))
    windows = [getattr(layer, "sliding_window", None) for layer in getattr(_cache(model, _LONG), "layers", ())]
    found: list[LayerState] = []
    for short, long, window in zip(short_sizes, long_sizes, windows, strict=True):
        per_token = (long - short) // (_LONG - _SHORT)
        width = window if isinstance(window, int) and window > 0 else None
        found.append(LayerState(per_token, short - per_token * _SHORT, width if per_token else None))
    return tuple(found)


@torch.no_grad()
def _cache(model: nn.Module, tokens: int) -> Any:
    device = next(model.parameters()).device
    with eval_mode(model):
        out = model(input_ids=torch.zeros(1, tokens, dtype=torch.long, device=device), use_cache=True)
    found = (getattr(out, name, None) for name in ("past_key_values", "cache_params"))
    return next((cache for cache in found if cache is not None), None)


def _sizes(cache: Any) -> list[int]:
    return [sum(_held(value) for value in vars(layer).values()) for layer in getattr(cache, "layers", ())]


def _held(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(_held, value.values()))
    return sum(map(_held, value)) if isinstance(value, list | tuple) else 0
