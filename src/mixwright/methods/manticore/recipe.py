"""How Manticore trains: *align* projectors, *search* mixture weights, *tune* from the pretrained weights again."""

from collections.abc import Iterable
from typing import cast

from torch import nn

from mixwright.methods.manticore.config import ManticoreConfig
from mixwright.methods.manticore.model import HybridModel, compose, copies
from mixwright.training.stage import ParamGroup, Stage

PROJECTORS = ("*.experts.enter.*", "*.experts.leave.*")
COMPONENTS = ("backbone.components.*",)
WEIGHTS = ("*.router.logits",)


def stages(config: ManticoreConfig) -> tuple[Stage, ...]:
    """The stages that `config` asks for, in order."""
    own = ParamGroup(select=(*COMPONENTS, *PROJECTORS), lr=config.learning_rate, name="components")
    alpha = ParamGroup(select=WEIGHTS, lr=config.weights_learning_rate, name="mixture weights")
    return (
        Stage(
            name="align",
            groups=(ParamGroup(select=PROJECTORS, lr=config.align_learning_rate, name="projectors"),),
            steps=config.align_steps,
            build=lambda backbone, seed, before: _started(config, backbone, before),
        ),
        Stage(name="search", groups=(own, alpha), steps=config.search_steps),
        Stage(name="tune", groups=(own,), steps=config.tune_steps),
    )


def _started(config: ManticoreConfig, backbone: nn.Module, before: HybridModel | None) -> HybridModel:
    return before or compose(config, copies(list(cast(Iterable[nn.Module], backbone))))
