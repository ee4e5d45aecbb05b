"""What a method is: a card, a config, a way to compose and stages to train."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from mixwright.catalog.store import Catalog
    from mixwright.composition.model import ComposedModel
    from mixwright.training.stage import Stage


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Where a method was published."""

    title: str
    authors: str
    year: int
    arxiv: str
    bibtex: str


@dataclass(frozen=True, kw_only=True)
class Method:
    """A published method: its card, and how it composes and trains. Subclass it in the method's `config.py`."""

    name: str
    paper: Paper
    summary: str
    config: type[Any]

    def compose(
        self, config: Any, backbones: "Sequence[nn.Module]", catalog: "Catalog | None" = None
    ) -> "ComposedModel":
        """One model out of backbones and the active experts of a catalogue."""
        raise NotImplementedError(f"{self.name} does not compose.")

    def stages(self, config: Any) -> "tuple[Stage, ...]":
        """What is trained, in order."""
        raise NotImplementedError(f"{self.name} trains nothing.")
