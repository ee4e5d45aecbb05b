"""Factors built before, kept while nothing they were built from has changed."""

from typing import Any

from torch import Tensor


class FactorCache:
    """Built factors by what was asked for. A copy or a pickle starts empty."""

    def __init__(self) -> None:
        self._entries: dict[Any, tuple[Tensor, Tensor]] = {}

    def forget(self) -> None:
        """As new."""
        self._entries.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {"_entries": {}}
