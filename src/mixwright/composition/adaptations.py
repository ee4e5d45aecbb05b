"""Adaptations that a model remembers by name: the mixture, and the classifier that goes with it."""

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixwright.composition.seen_tasks import as_tensor, words_in

PREFIX = "adapted."
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_ .-]{0,99}")


@dataclass(frozen=True)
class Adaptation:
    """`weights` of the mixture, or of each block's, at `strength`, and class prototypes under it at `temperature`.

    `held_out`: cosines of support items to prototypes made without them, and `held_out_labels`, where they were taken:
    by them a classifier knows when to abstain.
    """

    weights: Float[Tensor, " *blocks experts"]
    prototypes: Float[Tensor, "ways width"]
    classes: tuple[str, ...]
    strength: float = 1.0
    temperature: float = 1.0
    held_out: Float[Tensor, "items ways"] = field(default_factory=lambda: torch.zeros(0, 0))
    held_out_labels: Int[Tensor, " items"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """For `ComposedModel.whole`. Raises ValueError for a name that cannot be one in a file."""
        if not _NAME.fullmatch(name):
            raise ValueError(f"name {name!r}: expected letters, digits, spaces, '.', '-' and '_', at most 100.")
        start = f"{PREFIX}{name}."
        held = self.held_out.detach().float().cpu()
        return {
            f"{start}held_out": held.reshape(-1, len(self.classes)).clone(),
            f"{start}held_out_labels": self.held_out_labels.long().cpu().clone(),
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
        whole[f"{start}held_out"],
        whole[f"{start}held_out_labels"],
    )


def forget(whole: MutableMapping[str, Tensor], name: str) -> None:
    """Take an adaptation out. Raises ValueError where there is none."""
    adaptation_in(whole, name)
    for part in ("weights", "prototypes", "classes", "settings", "held_out", "held_out_labels"):
        del whole[f"{PREFIX}{name}.{part}"]
