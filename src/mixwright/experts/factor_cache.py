"""Factors built before, kept while nothing that they were built from has changed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mixwright.routing import Routing

MOST = 16
"""Choices that one cache keeps; a rank 16 choice of a layer of width 4096 takes half a megabyte."""


Built = tuple[Tensor, Tensor, Tensor | None]
"""Factors `(choices, rank, width)` down and up, and which of the choices each row has; see `ops/low_rank.py`."""


class FactorCache:
    """Built factors by tasks and type; valid while the weights are equal and the leaves unwritten.

    `latest` answers at once when the very same routing comes again. A copy or a pickle starts empty, and so does
    whoever calls `forget`.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """As new."""
        self._leaves: tuple[Any, ...] = ()
        self._entries: dict[Any, tuple[Tensor, Built]] = {}
        self._latest: tuple[Routing, Tensor | int, Any, Built] | None = None

    def latest(self, routing: Routing, how: Any, leaves: Sequence[Tensor]) -> Built | None:
        """What was built for this routing object at the last call, if it was asked for the same way."""
        latest = self._latest
        if latest is None or latest[0] is not routing or latest[2] != how or not self._unwritten(leaves):
            return None
        weights, seen = routing.weights, latest[1]
        same = weights._version == seen if isinstance(seen, int) else torch.equal(weights, seen)  # pyright: ignore[reportPrivateUsage]
        return latest[3] if same else None

    def find(self, routing: Routing, how: Any, key: Any, weights: Tensor, leaves: Sequence[Tensor]) -> Built | None:
        """What was built under `key` for equal weights."""
        if not self._unwritten(leaves):
            self.forget()
            return None
        entry = self._entries.get(key)
        if entry is None or not torch.equal(entry[0], weights):
            return None
        self._latest = (routing, _state(routing.weights), how, entry[1])
        return entry[1]

    def keep(
        self, routing: Routing, how: Any, key: Any, weights: Tensor, leaves: Sequence[Tensor], built: Built
    ) -> None:
        """Remember `built`; the oldest are dropped when too many choices are kept."""
        if any(leaf.is_inference() for leaf in leaves) or len(built[0]) > MOST:
            return
        self._leaves = tuple((leaf, leaf._version, leaf.data_ptr()) for leaf in leaves)  # pyright: ignore[reportPrivateUsage]
        self._entries.pop(key, None)
        self._entries[key] = (weights.detach().clone(), built)
        while sum(len(entry[0]) for _, entry in self._entries.values()) > MOST:
            del self._entries[next(iter(self._entries))]
        self._latest = (routing, _state(routing.weights), how, built)

    def _unwritten(self, leaves: Sequence[Tensor]) -> bool:
        if len(leaves) != len(self._leaves):
            return False
        for leaf, (seen, count, place) in zip(leaves, self._leaves):
            if leaf is not seen or leaf._version != count or leaf.data_ptr() != place:  # pyright: ignore[reportPrivateUsage]
                return False
        return True

    def __reduce__(self) -> Any:
        return FactorCache, ()


def _state(tensor: Tensor) -> Tensor | int:
    """How often a tensor was written to; of one made in inference mode, which does not count, what it holds."""
    return tensor.clone() if tensor.is_inference() else tensor._version  # pyright: ignore[reportPrivateUsage]
