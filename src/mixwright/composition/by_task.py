"""What rooms that know no method ask of a model that is routed by task: the names of its tasks, and a pass of one."""

import torch

from mixwright.composition.model import ComposedModel
from mixwright.routers.task import AbstractTaskRouter
from mixwright.routing import Condition


def task_names(model: ComposedModel) -> tuple[str, ...]:
    """The names of the tasks that a model was composed for, by id; none where it knows no tasks."""
    return tuple(getattr(type(model), "tasks", None) and model.tasks or ())


def task_id(model: ComposedModel, task: str | int) -> int:
    """The id of a task, by name or by number, also written as text. Raises ValueError for one that is not known."""
    known = task_names(model)
    if not known:
        raise ValueError(f"task {task!r}: this composition knows no tasks; leave the task out.")
    number = int(task) if isinstance(task, str) and task not in known and task.isdigit() else task
    return int(model.task_id(number))


def of_task(model: ComposedModel, task: str | int | None) -> Condition:
    """The condition of a pass of one task; of no task where that is None.

    Raises ValueError for a task that is not known, and for None where the routing depends on it.
    """
    if task is None:
        known = task_names(model)
        if any(isinstance(mixture.router, AbstractTaskRouter) for mixture in model.mixtures.values()):
            named = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
            raise ValueError(f"this composition is routed by task; say which: {named or 'by its number'}.")
        return Condition()
    device = next(model.backbone.parameters(), torch.zeros(())).device
    return Condition(task_ids=torch.tensor([task_id(model, task)], device=device))
