"""What a method is, and how methods are found: a folder beside this file, or another package's entry point.

Listing methods, printing a paper and checking a config import no torch: a card's `compose` and `stages` import the
folder's `model.py` and `recipe.py` when they are called.
"""

import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Literal

from mixwright import methods

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mixwright.catalog.store import Catalog
    from mixwright.composition.model import ComposedModel
    from mixwright.training.stage import Stage

ENTRY_POINTS = "mixwright.methods"


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
    """A published method: its card, and how it composes and trains: by files beside the `config.py` that makes it."""

    name: str
    paper: Paper
    summary: str
    config: type[Any]
    trains: Literal["expert", "composition"] = "expert"
    """What `mixwright train` makes: experts one at a time, for a catalogue, or a whole composition, which it saves. A
    config of the latter that has `tasks` gets the names of the recipe's tasks where it names none."""
    reads: Literal["text", "episodes"] = "text"
    """What training reads: texts, or episodes of domains; the config of a method that reads these has `episodes`."""
    backbones: Literal["one", "several"] = "one"
    """How many pretrained models it composes. One that takes several hands `build` of its stages an `nn.ModuleList`."""

    def compose(
        self, config: Any, backbones: "Sequence[nn.Module]", catalog: "Catalog | None" = None
    ) -> "ComposedModel":
        """One model out of backbones and the active experts of a catalogue: `compose` of the folder's `model.py`."""
        return self._part("model", "does not compose").compose(config, backbones, catalog)

    def restore(
        self, config: Any, backbone: "nn.Module", state: "Mapping[str, Tensor]", pool: Sequence[str]
    ) -> "ComposedModel":
        """The model whose `added_state()` was `state`, on the same backbone; `pool` are the ids of its experts.

        `restore` of the folder's `stored.py`.
        """
        return self._part("stored", "does not restore saved compositions").restore(config, backbone, state, pool)

    def stages(self, config: Any) -> "tuple[Stage, ...]":
        """What is trained, in order: `stages` of the folder's `recipe.py`."""
        return self._part("recipe", "trains nothing").stages(config)

    def presets(self) -> Mapping[str, Mapping[str, Any]]:
        """Parts of recipes to begin with, by name: `RECIPES` of the folder's `presets.py`, if there is such."""
        try:
            return getattr(self._part("presets", "has no presets"), "RECIPES", {})
        except NotImplementedError:
            return {}

    def _part(self, name: str, lacking: str) -> Any:
        """A file of the folder that the method's config stands in, imported when it is needed."""
        folder = self.config.__module__.rpartition(".")[0]
        try:
            return import_module(f"{folder}.{name}" if folder else name)
        except ModuleNotFoundError as error:
            if error.name != (f"{folder}.{name}" if folder else name):
                raise
            raise NotImplementedError(f"{self.name} {lacking}.") from error


def names() -> tuple[str, ...]:
    """Names of all methods at hand, sorted: the folders beside this file and other packages' entry points."""
    return tuple(sorted({*_folders(), *_entry_points()}))


def load(name: str) -> Method:
    """The card of the method called `name`.

    Raises:
        ValueError: there is no such method; the nearest name is suggested.
        TypeError: what stands under that name is not a `Method`, or has another name.
    """
    foreign = _entry_points()
    if name in _folders():
        card, where = import_module(f"mixwright.methods.{name}.config").METHOD, f"methods/{name}/config.py"
    elif name in foreign:
        card, where = foreign[name].load(), f"entry point {foreign[name].value}"
    else:
        near = get_close_matches(name, names(), n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names())}"
        raise ValueError(f"method {name!r} is not known; {advice}")
    if not isinstance(card, Method) or card.name != name:
        raise TypeError(f"{where}: expected a Method named {name!r}, got {card!r:.80}")
    return card


def _folders() -> tuple[str, ...]:
    return tuple(module.name for module in pkgutil.iter_modules(methods.__path__) if module.ispkg)


def _entry_points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}
