"""What a stage starts from: pretrained components, or the hybrid that the one before left."""

from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from typing import cast

from torch import nn

from mixwright.composition.model import ComposedModel
from mixwright.config import decode
from mixwright.methods.manticore.config import ManticoreConfig
from mixwright.methods.manticore.model import HybridModel, compose, copies

BUILT_IN = frozenset({"num_blocks", "projectors", "rows", "weights", "names", "prefix", "shared_vocabulary"})
"""What a composition that is there already can't be told otherwise. All else may be set anew."""


def pretrained_of(backbone: nn.Module) -> list[nn.Module]:
    """The components of a job, as they came."""
    return list(cast(Iterable[nn.Module], backbone))


def fresh(config: ManticoreConfig, backbone: nn.Module, seed: int) -> HybridModel:
    """A hybrid of copies of them that nothing has learned yet."""
    return compose(replace(config, seed=seed), copies(pretrained_of(backbone)))


def under(config: ManticoreConfig, model: ComposedModel) -> HybridModel:
    """A composition with the training settings of `config`. Raises ValueError for another setting that differs."""
    assert isinstance(model, HybridModel)
    stored = decode(ManticoreConfig, dict(model.composition.config), where="composition")
    for field in fields(ManticoreConfig):
        old, new = getattr(stored, field.name), getattr(config, field.name)
        if field.name in BUILT_IN and old != new:
            raise ValueError(
                f"config.{field.name}: the composition has {old!r} and the recipe {new!r}, which training cannot "
                "change; leave it out, or start afresh without recipe.composition."
            )
    built_in = {name: getattr(stored, name) for name in BUILT_IN}
    model.composition = replace(model.composition, config={**asdict(config), **built_in})
    return model
