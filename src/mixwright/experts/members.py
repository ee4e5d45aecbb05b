"""Which experts act on each weight, kept as bytes while the masks they were read from are unwritten."""

from typing import Any

from torch import Tensor

from mixwright.ops.membership import membership


class Members:
    """`membership` of each parameter's logits, found once; None where they have none. A copy or a pickle starts empty.

    Who writes to a parameter's `data` behind its back isn't heard of: call `forget`.
    """

    def __init__(self) -> None:
        self._found: dict[str, tuple[Tensor, int, int, Tensor | None]] = {}

    def forget(self) -> None:
        """As new."""
        self._found.clear()

    def find(self, name: str, logits: Tensor) -> Tensor | None:
        """The bytes of one parameter."""
        if logits.is_inference():
            return None
        kept = self._found.get(name)
        written, place = logits._version, logits.data_ptr()  # pyright: ignore[reportPrivateUsage]
        if kept is None or kept[0] is not logits or kept[1:3] != (written, place):
            kept = self._found[name] = (logits, written, place, membership(logits))
        return kept[3]

    def __reduce__(self) -> Any:
        return Members, ()
