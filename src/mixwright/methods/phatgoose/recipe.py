"""How PHATGOOSE trains: stage *expert*, then stage *gate*; nothing is ever trained on several experts at once."""

from typing import cast

from torch import nn

from mixwright.composition.model import ComposedModel
from mixwright.methods.phatgoose.config import PhatgooseConfig
from mixwright.methods.phatgoose.expert import at_full_strength, new_expert, trained_expert, with_gates
from mixwright.training.stage import ParamGroup, Stage, Trained

CHOOSE_EVERY = 100


def stages(config: PhatgooseConfig) -> tuple[Stage, ...]:
    """*expert*: the LoRA factors alone, best of every 100 steps. *gate*: the gate vectors alone, to the last step."""
    return (
        Stage(
            name="expert",
            groups=(ParamGroup(select=("*.experts.down", "*.experts.up"), lr=config.learning_rate),),
            steps=config.expert_steps,
            warmup=config.warmup,
            clip=config.clip,
            choose_every=CHOOSE_EVERY,
            build=lambda backbone, seed, before: _fresh(backbone, config, seed, before),
            harvest=lambda model: trained_expert(cast(ComposedModel, model), config.alpha / config.rank),
        ),
        Stage(
            name="gate",
            groups=(ParamGroup(select=("*.router.gate",), lr=config.learning_rate),),
            steps=config.gate_steps,
            warmup=config.warmup,
            clip=config.clip,
            build=lambda backbone, seed, before: _gated(backbone, before),
            harvest=lambda model: trained_expert(cast(ComposedModel, model)),
        ),
    )


def _fresh(backbone: nn.Module, config: PhatgooseConfig, seed: int, before: Trained | None) -> ComposedModel:
    del before
    return new_expert(backbone, config, seed)


def _gated(backbone: nn.Module, before: Trained | None) -> ComposedModel:
    if before is None:
        raise ValueError(
            "stage gate needs a trained expert; run stage expert first, or add the expert to the catalogue."
        )
    return with_gates(at_full_strength(backbone, before.factors))
