"""Losses that decide: of a hybrid, of each of its components alone, and of their ensemble, on the same batches."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from mixwright.backbones.eval_mode import eval_mode
from mixwright.data.batches import Batches
from mixwright.evaluation.ensemble import LogitEnsemble
from mixwright.methods.manticore.model import HybridModel
from mixwright.training.objectives import supervised

ENSEMBLE = "ensemble"


@dataclass(frozen=True)
class Reference:
    """What a hybrid must be measured against, in nats per token on held-out data: `alone` by component, and the mean of
    their logits."""

    alone: dict[str, float]
    ensemble: float

    @property
    def best(self) -> str:
        """The component with the least loss."""
        return min(self.alone, key=lambda name: self.alone[name])

    def plain(self) -> dict[str, Any]:
        """For the record."""
        return asdict(self)


@torch.no_grad()
def mean_loss(speaker: Any, batches: Batches) -> float:
    """Nats per token over every example once, in eval mode. `speaker`: a hybrid, or what answers like one."""
    device = next(speaker.parameters()).device
    total, count = 0.0, 0
    with eval_mode(getattr(speaker, "model", speaker)):
        for part in batches.in_order():
            batch = batches.take(part)
            total += float(supervised(speaker, batch.to(device)).double())
            count += batch.weight
    return total / max(1, count)


def reference(model: HybridModel, batches: Batches) -> Reference:
    """Of the components as they stand in `model`."""
    alone: dict[str, float] = {}
    for name in model.experts:
        with model.only(name):
            alone[name] = mean_loss(model, batches)
    return Reference(alone, mean_loss(LogitEnsemble(model, model.experts), batches))
