"""How PEER trains inside a model that exists: stage *distil*, where asked for, then stage *pretrain*.

The backbone stays frozen in both. The paper trains whole models, and says nothing about its optimiser.
"""

from dataclasses import replace

from torch import nn

from mixwright.composition.model import ComposedModel
from mixwright.methods.peer.composed import PeerComposedModel
from mixwright.methods.peer.config import PeerConfig
from mixwright.methods.peer.distil import match_replaced
from mixwright.methods.peer.model import compose
from mixwright.methods.peer.watch import Watch
from mixwright.training.continued import continued
from mixwright.training.objectives import supervised
from mixwright.training.stage import Objective, ParamGroup, Stage

CHOOSE_EVERY = 100

OF_TRAINING = frozenset(
    {
        "seed",
        "licence",
        "learning_rate",
        "router_learning_rate",
        "learning_rate_end",
        "table_optimizer",
        "weight_decay",
        "steps",
        "distil_steps",
    }
    | {"warmup", "cooldown", "clip"}
)
"""What may be set anew for a composition that is there already. All else is built into it."""


def stages(config: PeerConfig) -> tuple[Stage, ...]:
    """*distil*, if it has steps: each layer learns to say what the one that it replaced said. *pretrain*: all of them
    learn what the model is trained for; the best of every 100 steps where there is held-out data."""
    pretrain = _stage("pretrain", config, config.steps, supervised)
    if not config.distil_steps:
        return (pretrain,)
    return (_stage("distil", config, config.distil_steps, match_replaced), pretrain)


def groups(config: PeerConfig) -> tuple[ParamGroup, ...]:
    """The rows, and whatever leads to them and away: queries, norms, sub-keys, projections and gates of outputs."""
    paths = ["*.router.[qkn]*"]  # queries, keys and norms, those that there are
    if config.row_dim is not None:
        paths.append("*.experts.project_*")
    if config.layer["output_gate"]:
        paths.append("*.experts.output_gate.*")
    return (
        ParamGroup(
            select=("*.experts.table.*",),
            lr=config.learning_rate,
            lr_end=config.learning_rate_end,
            optimizer=config.table_optimizer,
            name="table",
        ),
        ParamGroup(select=tuple(paths), lr=config.router_learning_rate, name="router"),
    )


def _stage(name: str, config: PeerConfig, steps: int, objective: Objective) -> Stage:
    watch = Watch()
    return Stage(
        name=name,
        groups=groups(config),
        steps=steps,
        objective=objective,
        warmup=config.warmup,
        cooldown=config.cooldown,
        clip=config.clip,
        weight_decay=config.weight_decay,
        choose_every=CHOOSE_EVERY,
        build=lambda backbone, seed, before: _started(backbone, config, seed, before),
        watch=watch.look,
        alarms=watch.alarms,
        finish=lambda model, job: watch.end(),
    )


def _started(backbone: nn.Module, config: PeerConfig, seed: int, before: ComposedModel | None) -> PeerComposedModel:
    """Fresh experts, or those that are there already."""
    if before is None:
        return compose(replace(config, seed=seed), [backbone])
    assert isinstance(before, PeerComposedModel)
    continued(before, config, PeerConfig.settled, OF_TRAINING)
    return before
