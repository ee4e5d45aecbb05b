"""What is watched while a pool is meta-tuned: numbers that show collapse, and in words what to do about it."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixwright.experts.overlap import Overlap, overlap
from mixwright.methods.smat.config import SmatConfig
from mixwright.methods.smat.model import FewShotModel
from mixwright.ops.collapse import entropy

UNUSED = 0.1
"""Of the share that an expert would have if all were used alike: below that it is not in use."""
DENSE = 0.05
"""How far under the sparsity that is asked for an expert may be when the run is nearly over."""
EMPTY = 0.999
"""Sparsity at which an expert has nothing left."""
LATE = 0.8
"""Share of the run after which masks should have met their constraint."""
ENOUGH = 20
"""Episodes before usage says anything."""


class Watch:
    """Looks at a pool in training: numbers for the log, and which of them are bad news.

    `sparsity.min`, `.mean`: of the experts, counted; `multiplier.max`, `.mean`; `masks.fractional`: share of the masks
    that are neither 0 nor 1; `routing.temperature`. Of the episodes since the last look: `routing.usage`, entropy of
    the mean mixture / log M, `routing.entropy`, mean entropy of a mixture / log M, `routing.least`, the least share of
    an expert times M; blocks that have a mixture each count by their size. `experts.overlap`: mean Jaccard index of two
    experts' masks, over what they would have by chance.
    """

    def __init__(self, config: SmatConfig) -> None:
        self.config = config
        self.seen: list[Tensor] = []
        self._progress = 0.0

    def note(self, weights: Float[Tensor, " *blocks experts"]) -> None:
        """The mixture of an episode, or those of the backbone's blocks, a row each."""
        self.seen.append(weights.detach())

    @torch.no_grad()
    def look(self, model: nn.Module) -> dict[str, float]:
        """The numbers of this moment."""
        assert isinstance(model, FewShotModel)
        self._progress = model.router.progress
        numbers: dict[str, float] = {"routing.temperature": float(model.router.temperature)}
        if self.config.is_constrained:
            sparsity, multipliers = model.sparsity(), model.deltas.multipliers
            numbers |= {"sparsity.min": float(sparsity.min()), "sparsity.mean": float(sparsity.mean())}
            numbers |= {"multiplier.max": float(multipliers.max()), "multiplier.mean": float(multipliers.mean())}
            found = overlap(model.deltas)
            numbers["masks.fractional"] = float(found.fractional.mean())
            if len(sparsity) > 1:
                numbers["experts.overlap"] = _excess(found)
        if self.config.routes and self.seen:
            experts = model.mixture.experts
            mixtures = torch.stack([experts.by_block(weights) for weights in self.seen]).float()
            self.seen = []
            most, mean = math.log(experts.num_experts), experts.mean_over_blocks(mixtures).mean(0)
            each = experts.mean_over_blocks(entropy(mixtures)[..., None])
            numbers["routing.usage"] = float(entropy(mean)) / most
            numbers["routing.entropy"] = float(each.mean()) / most
            if len(mixtures) >= ENOUGH:
                numbers["routing.least"] = float(mean.min()) * experts.num_experts
        return numbers

    def alarms(self, numbers: Mapping[str, float]) -> dict[str, str]:
        """Name of each alarm -> what it means and what may help."""
        found: dict[str, str] = {}
        least, sparsity = numbers.get("routing.least", 1.0), numbers.get("sparsity.min", 1.0)
        if least < UNUSED:
            found["routing collapses"] = (
                f"an expert has {least:.0%} of an even share of the episodes; lower router_learning_rate, or raise "
                "gate_penalty"
            )
        if self._progress >= LATE and sparsity < self.config.sparsity - DENSE:
            found["an expert stays dense"] = (
                f"one leaves {sparsity:.1%} of the weights alone, and sparsity asks for {self.config.sparsity:.0%}; "
                "raise mask_learning_rate or multiplier_learning_rate, take more steps, or raise floor"
            )
        if numbers.get("sparsity.mean", 0.0) > max(EMPTY, self.config.sparsity):
            found["dead masks"] = (
                "next to nothing of the masks is left, and dead ones don't come back; lower mask_learning_rate or "
                "sparsity"
            )
        return found


def _excess(found: Overlap) -> float:
    """Mean over pairs of how much more two experts overlap than by chance; 0 where one of them has nothing left."""
    first, second = torch.triu_indices(len(found.density), len(found.density), 1)
    iou, chance = found.iou[first, second], found.chance[first, second]
    return float((iou / chance.clamp_min(1e-12)).masked_fill(chance == 0, 0.0).mean())
