"""Adaptations that a model remembers by name: the mixture, and the classifier that goes with it."""

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mixwright.composition.seen_tasks import as_tensor, words_in

PREFIX = "adapted."
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_ .-]{0,99}")


@dataclass(frozen=True)
class Adaptation:
    """`weights` (experts,) of the mixture at `strength`, and class prototypes under it at `temperature`."""

    weights: Float[Tensor, " experts"]
    prototypes: Float[Tensor, "ways width"]
    classes: tuple[str, ...]
    strength: float = 1.0
    temperature: float = 1.0

    def tensors(self, name: str) -> dict[str, Tensor]:
        """For `ComposedModel.whole`. Raises ValueError for a name that cannot be one in a file."""
        if not _NAME.fullmatch(name):
            raise ValueError(f"name {name!r}: expected letters, digits, spaces, '.', '-' and '_', at most 100.")
        start = f"{PREFIX}{name}."
        return {
            f"{start}weights": self.weights.detach().float().cpu().clone(),
            f"{start}prototypes": self.prototypes.detach().float().cpu().clone(),
            f"{start}classes": as_tensor(self.classes),
            f"{start}settings": torch.tensor([self.strength, self.temperature], dtype=torch.float64),
        }


def names_in(whole: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The names of the adaptations that are remembered."""
    return tuple(
        key.removeprefix(PREFIX).removesuffix(".weights")
        for key in whole
        if key.startswith(PREFIX) and key.endswith(".weights")
    )


def adaptation_in(whole: Mapping[str, Tensor], name: str) -> Adaptation:
    """The adaptation of that name. Raises ValueError where there is none."""
    if name not in names_in(whole):
        known = ", ".join(names_in(whole)) or "none"
        raise ValueError(f"no adaptation {name!r} is remembered; there is {known}. See `remember`.")
    start = f"{PREFIX}{name}."
    strength, temperature = whole[f"{start}settings"].tolist()
    return Adaptation(
        whole[f"{start}weights"],
        whole[f"{start}prototypes"],
        tuple(words_in(whole[f"{start}classes"])),
        strength,
        temperature,
    )


def forget(whole: MutableMapping[str, Tensor], name: str) -> None:
    """Take an adaptation out. Raises ValueError where there is none."""
    adaptation_in(whole, name)
    for part in ("weights", "prototypes", "classes", "settings"):
        del whole[f"{PREFIX}{name}.{part}"]
