"""How the pool is trained: stage *meta-tune*, over many episodes of many domains; *adapt* names new tasks."""

from dataclasses import replace
from typing import Any

from torch import nn

from mixwright.composition.model import ComposedModel
from mixwright.methods.smat.adapting import adapt, pool_before, remember_training
from mixwright.methods.smat.config import SmatConfig
from mixwright.methods.smat.episode_loss import EpisodeLoss
from mixwright.methods.smat.model import FewShotModel, compose
from mixwright.methods.smat.watch import Watch
from mixwright.training.stage import ParamGroup, Stage

MOMENTUM, MASK_CLIP, ROUTER_CLIP, ROUTER_DECAY = 0.9, 5.0, 1.0, 0.01
REFERENCE_STEPS = 12_500


def stages(config: SmatConfig) -> tuple[Stage, ...]:
    """*meta-tune*: shared change, masks, router and multipliers, each by its own rule. *adapt*: see `adapting`."""
    watch = Watch(config)
    return (
        Stage(
            name="meta-tune",
            groups=(),
            choose_groups=lambda model: groups(config, model),
            steps=config.steps,
            objective=EpisodeLoss(config, watch.note),  # type: ignore[arg-type]
            warmup=config.warmup,
            cooldown=config.cooldown,
            fall="cosine",
            clip=None,
            build=lambda backbone, seed, before: _started(config, backbone, seed, before),
            watch=watch.look,
            alarms=watch.alarms,
            finish=remember_training,
        ),
        Stage(name="adapt", groups=(), steps=0, data="new_tasks", build=pool_before, own_way=adapt),
    )


def groups(config: SmatConfig, model: nn.Module) -> tuple[ParamGroup, ...]:
    """What learns, and how (sheet a7).

    The loss has the mean over mask logits, so each feels a share that falls with their number: their rate grows with
    it. Rates of masks and multipliers times steps are those of the paper's run, whatever the number of steps.
    """
    assert isinstance(model, FewShotModel)
    pace = REFERENCE_STEPS / config.steps
    change = ParamGroup(
        select=("mixture.experts.delta.*",),
        lr=config.learning_rate,
        optimizer=config.optimizer,
        momentum=MOMENTUM if config.optimizer == "sgd" else 0.0,
        weight_decay=config.weight_decay,
        clip=False,
        name="shared change",
    )
    router = ParamGroup(
        select=("mixture.router.*",),
        lr=config.router_learning_rate,
        weight_decay=ROUTER_DECAY,
        clip=ROUTER_CLIP,
        name="router",
    )
    chosen = (change, *((router,) if config.routes else ()))
    if not config.is_constrained:
        return chosen
    units = sum(logits[0].numel() for logits in model.deltas.logits.values())
    masks = ParamGroup(
        select=("mixture.experts.logits.*",),
        lr=config.mask_learning_rate * units * pace,
        optimizer="sgd",
        weight_decay=0.0,
        clip=MASK_CLIP,
        name="masks",
    )
    multipliers = ParamGroup(
        select=("mixture.experts.multipliers",),
        lr=config.multiplier_learning_rate * pace,
        optimizer="dual_ascent",
        clip=False,
        name="multipliers",
    )
    return *chosen, masks, multipliers


def _started(config: SmatConfig, backbone: nn.Module, seed: int, before: ComposedModel | None) -> Any:
    return compose(replace(config, seed=seed), [backbone]) if before is None else before
