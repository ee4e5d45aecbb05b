"""How the pool is trained: stage *meta-tune*, over many episodes of many domains."""

from dataclasses import replace
from typing import Any

from torch import nn

from mixwright.composition.model import ComposedModel
from mixwright.methods.smat.config import SmatConfig
from mixwright.methods.smat.episode_loss import EpisodeLoss
from mixwright.methods.smat.model import FewShotModel, compose
from mixwright.training.stage import ParamGroup, Stage


def stages(config: SmatConfig) -> tuple[Stage, ...]:
    """*meta-tune*: shared change, masks, router and multipliers, each at its own rate."""
    loss = EpisodeLoss(config)
    return (
        Stage(
            name="meta-tune",
            groups=(),
            choose_groups=lambda model: groups(config, model),
            steps=config.steps,
            objective=loss,  # type: ignore[arg-type]
            warmup=config.warmup,
            cooldown=config.cooldown,
            build=lambda backbone, seed, before: _started(config, backbone, seed, before),
        ),
    )


def groups(config: SmatConfig, model: nn.Module) -> tuple[ParamGroup, ...]:
    """What learns, and how fast: the masks' rate is proportional to the number of weights."""
    assert isinstance(model, FewShotModel)
    total = sum(delta.numel() for delta in model.deltas.delta.values())
    return (
        ParamGroup(select=("mixture.experts.delta.*",), lr=config.learning_rate, name="shared change"),
        ParamGroup(select=("mixture.experts.logits.*",), lr=config.mask_learning_rate * total, name="masks"),
        ParamGroup(select=("mixture.router.*",), lr=config.router_learning_rate, name="router"),
        ParamGroup(
            select=("mixture.experts.multipliers",),
            lr=config.multiplier_learning_rate,
            maximize=True,
            name="multipliers",
        ),
    )


def _started(config: SmatConfig, backbone: nn.Module, seed: int, before: ComposedModel | None) -> Any:
    return compose(replace(config, seed=seed), [backbone]) if before is None else before
