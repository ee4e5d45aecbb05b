"""A tensor derived from others, made once and again when one of those has changed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def version(tensor: Tensor) -> int | None:
    """How often a tensor was written to; None for one made in inference mode, which does not count."""
    return None if tensor.is_inference() else tensor._version  # pyright: ignore[reportPrivateUsage]  (the only counter)


class Remembered:
    """`derive(*sources)`, remembered for as long as every source is the same tensor with the same content.

    Nothing is remembered of sources that record gradients or do not count their versions, nor while compiling. A copy
    or a pickle starts without memory.
    """

    def __init__(self, derive: Callable[..., Tensor]) -> None:
        self.derive = derive
        self._seen: tuple[tuple[Any, ...], tuple[Tensor, ...], Tensor] | None = None

    def __call__(self, *sources: Tensor, dtype: torch.dtype) -> Tensor:
        """The derived tensor in `dtype`."""
        if torch.compiler.is_compiling() or any(source.is_inference() or source.requires_grad for source in sources):
            return self.derive(*(source.to(dtype) for source in sources))
        key = (dtype, *((version(source), source.data_ptr()) for source in sources))
        seen = self._seen
        if seen is not None and seen[0] == key and all(a is b for a, b in zip(seen[1], sources, strict=True)):
            return seen[2]
        # What is made in inference mode could never again take part in a pass that records gradients.
        with torch.inference_mode(False), torch.no_grad():
            derived = self.derive(*(source.to(dtype) for source in sources))
        self._seen = (key, sources, derived)
        return derived

    def __getstate__(self) -> dict[str, Any]:
        return {"derive": self.derive, "_seen": None}
