"""A layer that a backbone keeps in two places: what comes in at its first half is carried to the mixture at its second.

BERT has `intermediate.dense` and `output.dense` with an activation between them, OPT `fc1` and `fc2`: no module is the
whole feed-forward layer. Experts that stand for it, or beside it, read what the first half reads and add to what the
second half says.
"""

from typing import Any

from torch import Tensor, nn

from mixwright.composition.channel import Channel


class Carried:
    """Holds one tensor on its way from an `Entry` to its mixture."""

    def __init__(self) -> None:
        self._tensor: Tensor | None = None

    def put(self, x: Tensor) -> None:
        """Here it comes in."""
        self._tensor = x

    def take(self) -> Tensor:
        """Here it is needed, once."""
        assert self._tensor is not None, "the second half of a layer ran without its first"
        x, self._tensor = self._tensor, None
        return x


class Entry(nn.Module):
    """The first half of a layer, `base`, whose input is carried on; where the layer is replaced it lets it through."""

    def __init__(self, base: nn.Module, carried: Carried, channel: Channel, *, replaced: bool) -> None:
        super().__init__()
        self.base = base
        self.carried = carried
        self.channel = channel
        self.replaced = replaced

    def forward(self, x: Tensor) -> Tensor:
        """What the layer's own first half says, or `x` itself where nobody will listen to that."""
        if not self.channel.enabled:
            return self.base(x)
        self.carried.put(x)
        return x if self.replaced else self.base(x)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base")
            if base is None or name.startswith("_"):
                raise
            return getattr(base, name)
