"""What a support set chose, as people ask for it: which experts, how sure, how new the task is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mixwright.composition.seen_tasks import Novelty
from mixwright.routing import Routing


@dataclass(frozen=True)
class Route:
    """One choice among experts for a whole task.

    `norms` (experts,): how far each expert moves the weights, |alpha_m z_m * delta|. `spread` (experts,): standard
    deviation of each weight over supports drawn again from this one. `novelty`: None where the model remembers no tasks
    of its training.
    """

    routing: Routing
    names: tuple[str, ...]
    norms: Float[Tensor, " experts"]
    spread: Float[Tensor, " experts"]
    novelty: Novelty | None = None
    classes: tuple[str, ...] = ()
    _edited: bool = field(default=False, repr=False)

    @property
    def weights(self) -> Float[Tensor, " experts"]:
        """alpha: how much each expert counts; they sum to 1."""
        return self.routing.dense()

    @property
    def leader(self) -> str:
        """The expert that counts most."""
        return self.names[int(self.routing.leader())]

    @property
    def entropy(self) -> float:
        """Of the weights, as a share of the largest possible: 0 is one expert alone, 1 all alike."""
        weights = self.weights.double()
        if len(weights) < 2:
            return 0.0
        return max(0.0, float(-torch.special.xlogy(weights, weights).sum()) / float(torch.tensor(len(weights)).log()))

    @property
    def doubt(self) -> float:
        """How far the mixture would move with other examples: half the sum of the spreads, 0 to 1."""
        return float(self.spread.sum() / 2)

    def with_weights(self, weights: Mapping[str | int, float]) -> "Route":
        """The same route with some weights set by hand, then all scaled to sum to 1.

        Raises ValueError for an unknown expert, a weight below 0, and where nothing is left.
        """
        chosen = self.weights.clone()
        for expert, weight in weights.items():
            if not weight >= 0 or weight == float("inf"):
                raise ValueError(f"{expert}: weight {weight}; expected 0 or more.")
            chosen[_place(self.names, expert)] = weight
        if not float(chosen.sum()) > 0:
            raise ValueError("every weight is 0; leave at least one expert, or use strength=0.")
        chosen = chosen / chosen.sum()
        scale = torch.where(self.weights > 0, chosen / self.weights, torch.nan)
        return replace(
            self, routing=Routing(chosen, len(self.names)), norms=self.norms * scale.nan_to_num(0.0), _edited=True
        )

    def __str__(self) -> str:
        order = self.weights.argsort(descending=True).tolist()
        width = max(len(name) for name in self.names)
        lines = [
            f"{self.names[m]:<{width}}  {float(self.weights[m]):6.1%} +- {float(self.spread[m]):.1%}"
            f"  moves the weights by {float(self.norms[m]):.3g}"
            for m in order
        ]
        by_hand = "set by hand; " if self._edited else ""
        lines.append(f"{by_hand}entropy {self.entropy:.2f} of 1, doubt {self.doubt:.2f}")
        lines.append("novelty unknown: no tasks are remembered" if self.novelty is None else str(self.novelty))
        return "\n".join(lines)


def _place(names: Sequence[str], expert: str | int) -> int:
    if isinstance(expert, int) and 0 <= expert < len(names):
        return expert
    if expert not in names:
        raise ValueError(f"no expert {expert!r}; there are {', '.join(names)}.")
    return names.index(str(expert))
