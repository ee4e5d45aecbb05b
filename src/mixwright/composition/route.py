"""What a support set chose, as people ask for it: which experts, how sure, how new the task is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mixwright.composition.seen_tasks import Novelty
from mixwright.routing import Routing


@dataclass(frozen=True)
class RoutedBlocks:
    """The blocks of the backbone that have a mixture each: names, shares of the weights that may change, and norms.

    `norms` (blocks, experts): |z_m * delta| of each expert in a block, at weight 1.
    """

    names: tuple[str, ...]
    shares: Float[Tensor, " blocks"]
    norms: Float[Tensor, "blocks experts"]

    def mean(self, values: Float[Tensor, "blocks experts"]) -> Float[Tensor, " experts"]:
        """Blocks count by their shares."""
        return (self.shares.to(values)[:, None] * values).sum(0)

    def moved(self, weights: Float[Tensor, "blocks experts"]) -> Float[Tensor, " experts"]:
        """How far each expert moves all weights at these of its own."""
        return (weights * self.norms).square().sum(0).sqrt()


@dataclass(frozen=True)
class Route:
    """One choice among experts for a whole task.

    `norms` (experts,): how far each expert moves the weights, |alpha_m z_m * delta|. `spread` (experts,): standard
    deviation of each weight over supports drawn again from this one. `novelty`: None where the model remembers no tasks
    of its training. `blocks`: where each has a mixture of its own; weights and spreads are then means over blocks.
    """

    routing: Routing
    names: tuple[str, ...]
    norms: Float[Tensor, " experts"]
    spread: Float[Tensor, " experts"]
    novelty: Novelty | None = None
    classes: tuple[str, ...] = ()
    blocks: RoutedBlocks | None = None
    _edited: bool = field(default=False, repr=False)

    @property
    def weights(self) -> Float[Tensor, " experts"]:
        """alpha: how much each expert counts; they sum to 1. Of mixtures by block the mean."""
        found = self.routing.dense()
        return found if self.blocks is None else self.blocks.mean(found)

    @property
    def leader(self) -> str:
        """The expert that counts most."""
        return self.names[int(self.weights.argmax())]

    @property
    def entropy(self) -> float:
        """Of the weights, as a share of the largest possible: 0 is one expert alone, 1 all alike. By block the mean."""
        weights = self.routing.dense().double()
        if weights.shape[-1] < 2:
            return 0.0
        each = -torch.special.xlogy(weights, weights)
        total = each if self.blocks is None else self.blocks.mean(each)
        return max(0.0, float(total.sum()) / float(torch.tensor(len(total)).log()))

    @property
    def doubt(self) -> float:
        """How far the mixture would move with other examples: half the sum of the spreads, 0 to 1."""
        return float(self.spread.sum() / 2)

    def with_weights(self, weights: Mapping[str | int, float]) -> "Route":
        """The same route with some weights set by hand, in every block, then all scaled to sum to 1.

        Raises ValueError for an unknown expert, a weight below 0, and where nothing is left.
        """
        before = self.routing.dense()
        chosen = before.clone()
        for expert, weight in weights.items():
            if not weight >= 0 or weight == float("inf"):
                raise ValueError(f"{expert}: weight {weight}; expected 0 or more.")
            chosen[..., _place(self.names, expert)] = weight
        total = chosen.sum(-1, keepdim=True)
        if not bool((total > 0).all()):
            raise ValueError("every weight is 0; leave at least one expert, or use strength=0.")
        chosen = chosen / total
        if self.blocks is not None:
            norms = self.blocks.moved(chosen)
        else:
            norms = self.norms * torch.where(before > 0, chosen / before, torch.nan).nan_to_num(0.0)
        return replace(self, routing=Routing(chosen, len(self.names)), norms=norms, _edited=True)

    def __str__(self) -> str:
        order = self.weights.argsort(descending=True).tolist()
        width = max(len(name) for name in self.names)
        lines = [
            f"{self.names[m]:<{width}}  {float(self.weights[m]):6.1%} +- {float(self.spread[m]):.1%}"
            f"  moves the weights by {float(self.norms[m]):.3g}"
            for m in order
        ]
        if self.blocks is not None:
            names, mixtures = self.blocks.names, self.routing.dense()
            wide = max(len(name) for name in names)
            for block, mixture in zip(names, mixtures, strict=True):
                shares = ", ".join(f"{name} {float(w):.0%}" for name, w in zip(self.names, mixture, strict=True))
                lines.append(f"  {block:<{wide}}  {shares}")
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
