"""How TensorPoly trains: stage *multitask*, all tasks together at two learning rates; stage *transfer*, a new task.

The authors train by Adafactor; here it is AdamW, with their rates, linear decay, 6 % warm-up and clipping at 1.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from mixwright.composition.model import ComposedModel
from mixwright.data.batches import Batches
from mixwright.data.tasks import Example
from mixwright.methods.tensorpoly.adapt import adapt
from mixwright.methods.tensorpoly.config import MATRIX, TensorPolyConfig
from mixwright.methods.tensorpoly.model import TaskComposedModel, compose
from mixwright.methods.tensorpoly.objective import objective
from mixwright.methods.tensorpoly.similarity import remember
from mixwright.methods.tensorpoly.task_rows import task_routers
from mixwright.methods.tensorpoly.watch import Watch
from mixwright.training.continued import continued
from mixwright.training.fitted import Fitted
from mixwright.training.job import Job
from mixwright.training.stage import ParamGroup, Stage

CHOOSE_EVERY = 100

OF_TRAINING = frozenset(
    {"tasks", "seed", "init", "learning_rate", "router_learning_rate", "steps", "warmup", "cooldown", "clip"}
    | {"transfer_learning_rate", "transfer_steps", "transfer", "start", "folds"}
    | {"mutual_information", "orthogonality", "sparsity", "ibp"}
)
"""What may be set anew for a composition that is there already. All else is built into it."""


def stages(config: TensorPolyConfig) -> tuple[Stage, ...]:
    """*multitask*: the latent experts at one rate and, where tasks choose, Z at a far higher one; the best of every
    100 steps where there is held-out data. *transfer*: what `adapt` does with each new task."""
    watch = Watch()
    return (
        Stage(
            name="multitask",
            groups=_groups(config, config.learning_rate, experts=True, router=True),
            steps=config.steps,
            objective=objective(config),
            warmup=config.warmup,
            cooldown=config.cooldown,
            clip=config.clip,
            choose_every=CHOOSE_EVERY,
            build=lambda backbone, seed, before: _started(backbone, config, seed, before),
            watch=watch.look,
            alarms=watch.alarms,
            finish=remember_tasks,
        ),
        Stage(
            name="transfer",
            groups=_groups(
                config,
                config.transfer_learning_rate,
                experts=config.transfer != "router",
                router=config.transfer != "experts",
            ),
            steps=config.transfer_steps,
            warmup=config.warmup,
            cooldown=config.cooldown,
            clip=config.clip,
            data="new_tasks",
            build=lambda backbone, seed, before: _trained(config, before),
            own_way=lambda model, job, quiet: _carried_over(model, job, config, quiet),
            finish=remember_tasks,
        ),
    )


def _groups(config: TensorPolyConfig, rate: float, *, experts: bool, router: bool) -> tuple[ParamGroup, ...]:
    """The tensors of A and B, and Z. Their names are given in full: a backbone may have experts of its own."""
    ending = "" if config.experts in MATRIX else ".[0-9]"
    factors = tuple(f"*.experts.{side}{ending}" for side in ("down", "up"))
    found: list[ParamGroup] = []
    if experts or not config.is_routed:
        found.append(ParamGroup(select=factors, lr=rate, name="experts"))
    if router and config.is_routed:
        found.append(ParamGroup(select=("*.router.logits",), lr=config.router_learning_rate, name="router"))
    return tuple(found)


def _started(
    backbone: nn.Module, config: TensorPolyConfig, seed: int, before: ComposedModel | None
) -> TaskComposedModel:
    """Fresh latent experts, or those that are there already."""
    return compose(replace(config, seed=seed), [backbone]) if before is None else _under(config, before)


def _trained(config: TensorPolyConfig, before: ComposedModel | None) -> TaskComposedModel:
    if before is None:
        raise ValueError(
            "stage transfer starts from a trained composition: run stage multitask first, or give recipe.composition."
        )
    return _under(config, before)


def _under(config: TensorPolyConfig, model: ComposedModel) -> TaskComposedModel:
    assert isinstance(model, TaskComposedModel)
    continued(model, config, TensorPolyConfig.settled, OF_TRAINING, kept={"tasks"})
    return model


def _carried_over(model: Any, job: Job, config: TensorPolyConfig, quiet: bool) -> Fitted:
    """Each new task, one after another. Raises ValueError for several tasks that would change each other."""
    if len(job.new_tasks) > 1 and config.transfer != "router":
        raise ValueError(
            f"recipe.data.new_tasks: {len(job.new_tasks)} tasks, and config.transfer={config.transfer} may train the "
            "experts that they share, so that each would change the ones before; give each a recipe of its own, or "
            "set config.transfer=router."
        )
    data = job.recipe.data
    found = [
        adapt(
            model,
            name,
            task,
            seed=job.recipe.seed,
            tokenizer=job.tokenizer,
            batch_size=job.recipe.train.batch_size,
            max_length=data.max_length,
            quiet=quiet,
        )
        for name, task in job.new_tasks.items()
    ]
    return Fitted(
        steps=sum(one.steps for one in found),
        loss=found[-1].loss,
        best=None,
        seconds=sum(one.seconds for one in found),
        said="\n".join(map(str, found)),
    )


def remember_tasks(model: Any, job: Job) -> None:
    """Remember what texts of the job's tasks look like, from `train.signature_batches` batches of each; 0: of none."""
    how = job.recipe.train
    count = how.signature_batches * how.batch_size
    if not count or not task_routers(model):
        return
    remembered = partial(
        remember, model, tokenizer=job.tokenizer, batch_size=how.batch_size, max_length=job.recipe.data.max_length
    )
    data = job.data
    for number, name in enumerate(data.tasks if data is not None else ()):
        assert data is not None
        rows = [row for row in data.examples if row[0] == number][:count]
        texts = [row.text for _, row in rows if isinstance(row, Example)]  # an answer is not known when it is asked for
        remembered(name, texts or Batches(rows, data.collate, batch_size=how.batch_size, seed=0))
    for name, task in job.new_tasks.items():
        if name in model.tasks:
            remembered(name, task, limit=count)
