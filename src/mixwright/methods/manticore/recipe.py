"""How Manticore trains: *inspect*, *align*, *search*, *tune*, *discretise*, *evaluate* (sheet, a.5 and i.4).

Each stage starts from what the one before left, on the same day or another, proves that what it must not touch stood
still, and says what it showed before the next builds on it.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from mixwright.composition.model import ComposedModel
from mixwright.methods.manticore.aligning import Align
from mixwright.methods.manticore.config import ManticoreConfig
from mixwright.methods.manticore.evaluating import evaluate
from mixwright.methods.manticore.inspecting import inspect
from mixwright.methods.manticore.model import HybridModel
from mixwright.methods.manticore.search_stage import Search
from mixwright.methods.manticore.starting import fresh, under
from mixwright.methods.manticore.tune_stages import Discretise, Tune
from mixwright.training.fitted import Fitted
from mixwright.training.gates import Findings
from mixwright.training.job import Job
from mixwright.training.stage import Stage


def stages(config: ManticoreConfig) -> tuple[Stage, ...]:
    """The stages that `config` asks for, in order. Programmed mixture weights are not searched for."""
    made: list[Stage] = []
    if config.inspect:
        made.append(_looking("inspect", config, inspect))
    if config.align_steps:
        made.append(Align(config).stage())
    if config.search_steps and config.mixture_weights is None:
        made.append(Search(config).stage())
    if config.tune_steps:
        made.append(Tune(config).stage())
    if config.discretise_steps:
        made.append(Discretise(config).stage())
    if config.evaluate:
        made.append(_looking("evaluate", config, evaluate))
    return tuple(made)


Look = Callable[[HybridModel, Job, ManticoreConfig, bool], Findings]


def _looking(name: str, config: ManticoreConfig, look: Look) -> Stage:
    """A stage that trains nothing and leaves nothing but its record."""

    def build(backbone: nn.Module, seed: int, before: ComposedModel | None) -> HybridModel:
        if before is None and name == "evaluate":
            raise ValueError("stage evaluate compares what was trained: run the stages before it first.")
        return under(config, before) if before is not None else fresh(config, backbone, seed)

    def nothing(model: Any, job: Job, quiet: bool) -> Fitted:
        del model, job, quiet
        return Fitted(steps=0, loss=None, best=None, seconds=0.0)

    def examine(model: HybridModel, job: Job, quiet: bool) -> Findings:
        return look(model, job, config, quiet)

    return Stage(
        name=name,
        groups=(),
        steps=0,
        build=build,
        own_way=nothing,
        examine=examine,
        leaves=False,
        stops=config.gates == "stop",
    )
