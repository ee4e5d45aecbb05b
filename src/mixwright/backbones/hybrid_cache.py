"""The cache of a hybrid: a native cache for each component that was run, indexed by that component's own layers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache


class HybridCache(Cache):
    """Counts tokens, and hands on to the native caches what is asked of a cache.

    `native`: component index -> its cache; `names`, its name. `layers` has what else travels with the tokens, such as
    what routers remember. `length`: tokens that have passed.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.native: dict[int, Any] = {}
        self.names: dict[int, str] = {}
        self.length = 0

    def of(self, index: int, name: str, component: nn.Module) -> Any:
        """The native cache of a component, as `generate` would make it.

        Raises ValueError for one that was not run while earlier tokens passed.
        """
        if index not in self.native:
            if self.length:
                raise ValueError(
                    f"component {name!r} has no part in this cache: its weight was 0 everywhere while {self.length} "
                    "tokens passed. Change mixture weights between texts, and begin each with a new cache."
                )
            config: Any = component.config
            self.native[index] = DynamicCache(config=config.get_text_config(decoder=True))
            self.names[index] = name
        return self.native[index]

    def is_recurrent(self, index: int) -> bool:
        """Whether a component's cache has layers of state: its forward then looks at the last of them."""
        return any(_states(layer) is not None for layer in self.native[index].layers)

    def has_attention(self, index: int) -> bool:
        """Whether some layer of a component's cache keeps keys and values."""
        return any(hasattr(layer, "keys") for layer in self.native[index].layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that have passed."""
        del layer_idx
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """There is no limit, -1."""
        del layer_idx
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        self._refuse_state_elsewhere()
        for cache in self.native.values():
            cache.reorder_cache(beam_idx)
        self._carried(lambda layer: layer.reorder_cache(beam_idx))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows; a mask of rows works as well."""
        # Layers of state have no method of this name: choosing rows is what reordering does.
        self.reorder_cache(indices.nonzero().squeeze(-1) if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row in place."""
        if self.length:
            self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Take tokens back. Raises ValueError where a component has recurrent state, which can't be taken back."""
        count = abs(tokens_to_remove)
        stuck = [self.names[index] for index, cache in self.native.items() if not cache.is_croppable]
        if stuck and count:
            raise ValueError(
                f"the cache can't be cropped by {count} tokens: component {stuck[0]!r} keeps a recurrent state, which "
                "sums up all tokens so far. Decode without an assistant model, or with attention components only."
            )
        for cache in self.native.values():
            if count or cache.is_croppable:
                cache.crop(-count)
        self._carried(lambda layer: layer.crop(-count))
        self.length -= count

    def activate_past_recording(self) -> None:
        """Sliding windows keep what they would drop, until `crop`."""
        for cache in self.native.values():
            cache.activate_past_recording()

    def reset(self) -> None:
        """Start anew."""
        for cache in self.native.values():
            cache.reset()
        self._carried(lambda layer: layer.reset())
        self.length = 0

    @property
    def batch_size(self) -> int:
        """Rows of the batch; -1 before the first pass."""
        for cache in self.native.values():
            for layer in cache.layers:
                states = _states(layer) or ()
                held = next((t for t in (getattr(layer, "keys", None), *states) if isinstance(t, Tensor)), None)
                if held is not None and held.dim() > 1:
                    return held.shape[0]
        return -1

    @property
    def is_compileable(self) -> bool:
        """A hybrid's pass is not one graph."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether a token has passed."""
        return self.length > 0

    @property
    def is_croppable(self) -> bool:
        """Whether every component's cache can take tokens back."""
        return all(cache.is_croppable for cache in self.native.values())

    def _carried(self, change: Callable[[Any], object]) -> None:
        for layer in self.layers:
            change(layer)

    def _refuse_state_elsewhere(self) -> None:
        """A layer of state that nobody wrote to, though tokens have passed, has its state in the model's modules."""
        for index, cache in self.native.items():
            for states in filter(None, map(_states, cache.layers)):
                if self.length and all(state is None for state in states):
                    raise ValueError(
                        f"rows of the batch can't be moved: component {self.names[index]!r} keeps its state in its "
                        "modules, outside of any cache. Generate with one beam, or with use_cache=False."
                    )


def _states(layer: Any) -> tuple[Any, ...] | None:
    """The tensors of a layer of state; None for a layer of keys and values alone."""
    if not hasattr(layer, "recurrent_states"):
        return None
    return *layer.conv_states.values(), *layer.recurrent_states.values()
