"""A composition that is trained on has the training settings of the recipe; what is built into it can't change."""

from collections.abc import Callable, Collection
from dataclasses import asdict, fields, replace
from typing import Any, TypeVar

from mixwright.composition.model import ComposedModel
from mixwright.config import decode

Config = TypeVar("Config")


def continued(
    model: ComposedModel,
    config: Config,
    settled: Callable[[Config], Any],
    of_training: Collection[str],
    kept: Collection[str] = (),
) -> None:
    """Put the fields `of_training` of `config` into what `model` says of itself; those `kept` stay as they are in it.

    `settled` fills in what a config leaves open, so that what was composed and what is asked for compare. Raises
    ValueError naming another field that differs.
    """
    stored = settled(decode(type(config), model.composition.config, where="composition"))
    asked = settled(config)
    for field in fields(stored):
        old, new = getattr(stored, field.name), getattr(asked, field.name)
        if field.name not in of_training and old != new:
            raise ValueError(
                f"config.{field.name}: the composition has {old!r} and the recipe {new!r}, which training cannot "
                "change; leave it out, or start afresh without recipe.composition."
            )
    given: dict[str, Any] = asdict(config)  # type: ignore[call-overload]
    settings = {name: value for name, value in given.items() if name in of_training and name not in kept}
    model.composition = replace(model.composition, config={**asdict(stored), **settings})
