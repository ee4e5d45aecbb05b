"""The calls a user makes: `mw.compose`, `mw.train`, `mw.load`, `mw.evaluate`. The one place that joins methods with the rest."""

from pathlib import Path
from typing import Any

from torch import nn

from mixwright import config as configuration
from mixwright.backbones.hf import load_backbone
from mixwright.catalog.store import Catalog
from mixwright.composition.model import ComposedModel
from mixwright.methods.base import load as load_method


def compose(
    method: str,
    *,
    backbone: nn.Module | str | Path,
    catalog: Catalog | str | Path | None = None,
    **config: Any,
) -> ComposedModel:
    """One model by a method's name, out of a backbone (a model, a folder or a hub id) and a catalogue's active experts.

    `config` are fields of the method's config dataclass; an unknown one is refused with the nearest name. The backbone
    is frozen and gets its mixtures in place; `model.remove()` gives it back as it was.
    """
    card = load_method(method)
    settings = configuration.decode(card.config, config, where=f"{method} config")
    model = backbone if isinstance(backbone, nn.Module) else load_backbone(str(backbone))
    shelf = Catalog(catalog) if isinstance(catalog, str | Path) else catalog
    return card.compose(settings, [model], shelf)
