"""How TensorPoly trains: stage *multitask*, all tasks together at two learning rates."""

from dataclasses import replace

from mixwright.methods.tensorpoly.config import TensorPolyConfig
from mixwright.methods.tensorpoly.model import compose
from mixwright.training.stage import ParamGroup, Stage


def stages(config: TensorPolyConfig) -> tuple[Stage, ...]:
    """*multitask*: the latent experts at one rate and, where tasks choose, Z at a far higher one."""
    experts = ParamGroup(select=("*.experts.down*", "*.experts.up*"), lr=config.learning_rate)
    router = ParamGroup(select=("*.router.logits",), lr=config.router_learning_rate)
    return (
        Stage(
            name="multitask",
            groups=(experts, router) if config.is_routed else (experts,),
            steps=config.steps,
            warmup=config.warmup,
            cooldown=config.cooldown,
            clip=config.clip,
            build=lambda backbone, seed, before: compose(replace(config, seed=seed), [backbone]),
        ),
    )
