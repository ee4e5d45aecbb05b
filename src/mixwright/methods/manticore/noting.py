"""What every stage that trains writes down: digests of what it started from and ended with, weights, held-out loss."""

from typing import Any

from torch import nn

from mixwright.methods.manticore.config import ManticoreConfig
from mixwright.methods.manticore.losses import mean_loss
from mixwright.methods.manticore.model import HybridModel
from mixwright.methods.manticore.rewinding import component_digests, pretrained_digests, weights_digest
from mixwright.methods.manticore.searching import watch_weights
from mixwright.methods.manticore.starting import pretrained_of
from mixwright.training.job import Job


class Notes:
    """Notes of one stage. They are begun when its model is built and read when it is trained."""

    def __init__(self) -> None:
        self.known: dict[str, Any] = {}

    def started(self, model: HybridModel, backbone: nn.Module) -> HybridModel:
        """Note what the model starts from."""
        self.known["components_at_start"] = component_digests(model)
        self.known["pretrained"] = pretrained_digests(model.experts, pretrained_of(backbone))
        self.known["mixture_weights_at_start_sha256"] = weights_digest(model)
        return model

    def record(self, model: HybridModel, job: Job, **more: Any) -> dict[str, Any]:
        """The notes, the mixture weights, and the held-out loss; None where there is no data for it."""
        loss = None if job.validation is None else mean_loss(model, job.validation)
        return {
            **self.known,
            "components_at_end": component_digests(model),
            "mixture_weights_sha256": weights_digest(model),
            "mixture_weights": dict(watch_weights(model)),
            "held_out_loss": loss,
            **more,
        }


def training_settings(config: ManticoreConfig, *, chooses: bool = True) -> dict[str, Any]:
    """Fields of `Stage` that all stages share which train. `chooses`: the best weights, or the last."""
    return {
        "groups": (),
        "warmup": config.warmup,
        "cooldown": config.cooldown,
        "weight_decay": config.weight_decay,
        "choose_every": config.choose_every if chooses else None,
        "watch": watch_weights,
        "proves_frozen": True,
        "stops": config.gates == "stop",
    }
