"""Lets a routing memory travel with a cache: whoever reorders, repeats or drops rows of the cache moves it along.

A cache is known by its shape, a list `layers` (an encoder-decoder's holds it in `self_attention_cache`); the memory is
one more layer at its end, appended when a pass is over, that answers what caches ask of their layers.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mixwright.routing import RoutingMemory

_NAMES = ("past_key_values", "cache_params")


class MemoryLayer:
    """A cache layer without keys and values. Its methods are the ones of a cache layer of transformers >= 5."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    is_initialized = True
    supports_early_init = False

    def __init__(self, memory: RoutingMemory) -> None:
        self.memory = memory
        self.length = 0
        """Tokens of the cache that the memory knows of."""
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def get_seq_length(self) -> int:
        """It holds no tokens of its own."""
        return 0

    def get_max_length(self) -> int:
        """There is no limit, -1."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow a beam search."""
        self.memory.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows; a mask of rows works as well."""
        self.memory.select(indices.nonzero().squeeze(-1) if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row in place."""
        self.memory.repeat(repeats)

    def reset(self) -> None:
        """Start anew with the cache."""
        self.memory.forget()
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take tokens back, as an assistant's rejected guesses are; see `RoutingMemory.crop` for how many."""
        self.memory.crop(abs(tokens_to_remove))
        self.length -= abs(tokens_to_remove)

    def offload(self) -> None:
        """It is small and stays where it is."""

    def prefetch(self) -> None:
        """It never left."""


def resume(given: Iterable[Any]) -> RoutingMemory:
    """The memory that travels with a cache among the arguments `given`, or a new one, which is told what it missed."""
    for value in given:
        layers = _layers(value)
        if layers is not None:
            layer = _memory_layer(layers)
            memory = RoutingMemory() if layer is None else layer.memory
            memory.unseen = _length(value) - (0 if layer is None else layer.length)
            return memory
    return RoutingMemory()


def attach(memory: RoutingMemory, output: Any, given: Iterable[Any]) -> None:
    """Append `memory` to the cache that a pass returned, or else was given, if it holds anything worth carrying.

    Raises ValueError for a cache of another kind.
    """
    if not memory.tokens and not memory.sources:
        return
    returned = _returned(output)
    for cache in (returned, *given):
        layers = _layers(cache)
        if layers is not None:
            layer = _memory_layer(layers)
            if layer is None:
                layer = MemoryLayer(memory)
                layers.append(layer)
            if memory.visits:
                layer.length = _length(cache)
            return
    if returned is not None:
        raise ValueError(
            "this model's routers pool over tokens (pooling or prior), and a cache of type "
            f"{type(returned).__name__} can't carry what they remember; accepted is a cache with a list of layers "
            "(transformers' DynamicCache and its like). Pass use_cache=False, or compose with pooling=0, prior=0."
        )


def _memory_layer(layers: list[Any]) -> MemoryLayer | None:
    return next((layer for layer in layers if isinstance(layer, MemoryLayer)), None)


def _returned(output: Any) -> Any:
    if isinstance(output, Mapping):
        return next((output[name] for name in _NAMES if output.get(name) is not None), None)  # type: ignore[index]
    return None


def _layers(cache: Any) -> list[Any] | None:
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None)
    return layers if isinstance(layers, list) else None  # type: ignore[return-value]


def _length(cache: Any) -> int:
    """Tokens in a cache, where that is a plain number: a static cache counts on the device, and is not asked."""
    try:
        length = cache.get_seq_length()
    except (AttributeError, ValueError):  # caches of state-space models have no length
        return 0
    return length if isinstance(length, int) else 0
