"""A task's row of logits in every router: of one task alone for a while, or one more for good."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from mixwright.composition.model import ComposedModel
from mixwright.methods.tensorpoly.initial import first_logits
from mixwright.routers.task import TaskLogits

Rows = Mapping[TaskLogits, Tensor]
"""Router -> logits (1, [positions,] experts) of one task."""


def task_routers(model: ComposedModel) -> tuple[TaskLogits, ...]:
    """The routers with learned rows, each once however many sites it serves; none where tasks do not choose."""
    routers = (mixture.router for mixture in model.mixtures.values())
    return tuple(dict.fromkeys(router for router in routers if isinstance(router, TaskLogits)))


def fresh_rows(model: ComposedModel, seed: int) -> Rows:
    """U(-1e-3, 1e-3), drawn router after router."""
    draw = torch.Generator().manual_seed(seed)
    return {router: first_logits((1, *router.logits.shape[1:]), draw) for router in task_routers(model)}


def mean_rows(model: ComposedModel) -> Rows:
    """The mean of the logits of all tasks."""
    return {router: router.logits.detach().mean(0, keepdim=True) for router in task_routers(model)}


def rows_of(model: ComposedModel, task: int) -> Rows:
    """The logits of one task."""
    return {router: router.logits.detach()[task : task + 1].clone() for router in task_routers(model)}


def even_rows(model: ComposedModel) -> Rows:
    """Zero logits: every expert weighs the same."""
    return {router: torch.zeros_like(router.logits.detach()[:1]) for router in task_routers(model)}


@contextmanager
def alone(model: ComposedModel, rows: Rows) -> Generator[Rows]:
    """Inside the block the model knows one task, id 0, that starts with `rows`; yields its rows, live.

    The other tasks' logits are no part of the model there, so nothing can move them.
    """
    ours = {router: _like(router, row) for router, row in rows.items()}
    routers = {site: mixture.router for site, mixture in model.mixtures.items()}
    sites = {site: ours[router] for site, router in routers.items() if isinstance(router, TaskLogits)}
    try:
        with model.replaced(routers=sites):
            yield {router: one.logits for router, one in ours.items()}
    finally:
        for mixture in model.mixtures.values():  # training may have moved the model meanwhile
            mixture.router.to(next(mixture.experts.parameters()).device)


def append(model: ComposedModel, name: str, rows: Rows) -> None:
    """The model knows one task more, `name`, the last, with these logits."""
    for router, row in rows.items():
        asked, before = router.logits.requires_grad, router.logits.detach()
        router.logits = nn.Parameter(torch.cat([before, row.detach().to(before)]), requires_grad=asked)
        router.to(before.device)  # which forgets what was remembered of the shorter table
    set_tasks(model, (*task_names(model), name))


def task_names(model: ComposedModel) -> tuple[str, ...]:
    """The tasks in the order of their ids."""
    return tuple(model.composition.config.get("tasks", ()))


def set_tasks(model: ComposedModel, names: Sequence[str]) -> None:
    """What the composition says of its tasks, and what is saved with it."""
    config = {**model.composition.config, "tasks": tuple(names)}
    model.composition = replace(model.composition, config=config)


def _like(router: TaskLogits, row: Tensor) -> TaskLogits:
    one = TaskLogits(
        row.detach().to(router.logits).clone(),
        noise=router.noise,
        temperature=router.temperature,
        straight_through=router.straight_through,
    )
    return one.train(router.training)
