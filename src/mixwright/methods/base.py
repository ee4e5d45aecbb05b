"""What a method says of itself, and how methods are found: a folder here, or an entry point of another package.

Listing methods, printing a paper and checking a config import no torch: `Method.compose` and `Method.stages` import the
folder's `model.py` and `recipe.py` when they are called.
"""

import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixwright.catalog.store import Catalog
    from mixwright.composition.model import ComposedModel
    from mixwright.training.stage import Stage

ENTRY_POINTS = "mixwright.methods"


@dataclass(frozen=True, kw_only=True)
class Paper:
    """The publication a method follows."""

    title: str
    authors: tuple[str, ...]
    year: int
    arxiv: str
    """arXiv id without version, for example 2402.05859."""
    venue: str
    bibtex: str
    """The entry that `mixwright cite` prints."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A published way of composing experts: its paper, its config, and the two functions that build it.

    Each method's `config.py` holds one, called `METHOD`.
    """

    name: str
    """The folder's name, and what `compose` and recipes take."""
    summary: str
    """What it does, in one line."""
    choose_when: str
    """The situation it is for, in one line."""
    paper: Paper
    config: type
    """Frozen dataclass of the settings; each field's docstring names its symbol and section in the paper."""
    module: str
    """The package with `model.py` and `recipe.py`, normally `__package__` of the file with the card."""

    def compose(self, config: Any, backbone: Any, catalog: "Catalog", experts: Sequence[str]) -> "ComposedModel":
        """The backbone with the named experts of the catalogue behind this method's routers; see `model.py`."""
        return self._function("model", "compose")(config, backbone, catalog, experts)

    def stages(self, config: Any) -> "tuple[Stage, ...]":
        """What is trained, in order; see `recipe.py`."""
        return self._function("recipe", "stages")(config)

    def _function(self, file: str, name: str) -> Callable[..., Any]:
        return getattr(import_module(f"{self.module}.{file}"), name)


def names() -> tuple[str, ...]:
    """Names of all methods at hand, sorted: the folders beside this file and the entry points of other packages."""
    return tuple(sorted({*_folders(), *_foreign()}))


def load(name: str) -> Method:
    """The card of the method called `name`.

    Raises:
        ValueError: there is no such method; the nearest name is suggested.
        TypeError: what stands under that name is not a `Method`, or is called otherwise.
    """
    if name in _folders():
        card, where = import_module(f"{__package__}.{name}.config").METHOD, f"methods/{name}/config.py"
    elif name in (foreign := _foreign()):
        card, where = foreign[name].load(), f"entry point {foreign[name].value}"
    else:
        near = get_close_matches(name, names(), n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names()) or 'none'}"
        raise ValueError(f"method {name!r} is not known; {advice}")
    if not isinstance(card, Method) or card.name != name:
        raise TypeError(f"{where}: expected a Method named {name!r}, got {card!r:.80}")
    return card


def _folders() -> tuple[str, ...]:
    # `__path__` of the package, not only this file's folder: a namespace may be extended, as tests do.
    path = import_module(str(__package__)).__path__
    rooms = (module.name for module in pkgutil.iter_modules(path) if module.ispkg)
    return tuple(room for room in rooms if any((Path(place) / room / "config.py").is_file() for place in path))


def _foreign() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}
