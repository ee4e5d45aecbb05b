"""Experts trained apart, composed into one model that chooses among them for every token and layer.

    import mixwright as mw
    model = mw.compose("phatgoose", backbone="my-backbone", catalog="my-catalog")

The public names are resolved on first use, so that importing the package costs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixwright.api import compose, convert, evaluate, from_peft_poly, load, train
    from mixwright.catalog.store import Catalog
    from mixwright.composition.model import ComposedModel
    from mixwright.data.episodes import Episode
    from mixwright.errors import CatalogError, IncompatibleExpert, MissingExtra
    from mixwright.methods.peer.layer import PEER
    from mixwright.methods.smat.classifier import FewShotClassifier
    from mixwright.routing import Condition, Routing, SupportSet
    from mixwright.training.row_optimizers import LazyAdamW, RowwiseAdagrad

__version__ = "0.1.0"

__all__ = [
    "Catalog",
    "CatalogError",
    "ComposedModel",
    "Condition",
    "Episode",
    "FewShotClassifier",
    "IncompatibleExpert",
    "LazyAdamW",
    "MissingExtra",
    "PEER",
    "Routing",
    "RowwiseAdagrad",
    "SupportSet",
    "__version__",
    "compose",
    "convert",
    "evaluate",
    "from_peft_poly",
    "load",
    "train",
]

_HOMES = {
    "Catalog": "catalog.store",
    "CatalogError": "errors",
    "ComposedModel": "composition.model",
    "Condition": "routing",
    "Episode": "data.episodes",
    "FewShotClassifier": "methods.smat.classifier",
    "IncompatibleExpert": "errors",
    "LazyAdamW": "training.row_optimizers",
    "MissingExtra": "errors",
    "PEER": "methods.peer.layer",
    "Routing": "routing",
    "RowwiseAdagrad": "training.row_optimizers",
    "SupportSet": "routing",
    "compose": "api",
    "convert": "api",
    "evaluate": "api",
    "from_peft_poly": "api",
    "load": "api",
    "train": "api",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'mixwright' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"mixwright.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
