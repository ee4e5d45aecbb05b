"""Every system on every task, with one backbone in memory."""

from collections.abc import Callable, Sequence

from mixwright.backbones.eval_mode import eval_mode
from mixwright.composition.model import ComposedModel
from mixwright.evaluation.scores import AbstractTask
from mixwright.evaluation.systems import System
from mixwright.evaluation.table import Scores, Table


def evaluate(
    model: ComposedModel,
    tasks: Sequence[AbstractTask],
    systems: Sequence[System],
    *,
    seed: int = 0,
    progress: Callable[[str, str], None] | None = None,
) -> Table:
    """Scores of every example. `model` serves all systems, one after the other, and is left as it was.

    `progress` is called with the system's and the task's name before each is measured.
    """
    table = Table()
    with eval_mode(model):
        for system in systems:
            with system.enter(model):
                speaker = system.speaker(model)
                for task in tasks:
                    if progress is not None:
                        progress(system.name, task.name)
                    scores = task.score(speaker, lambda batch, s=system: s.condition(model, batch))
                    for metric, values in scores.items():
                        table.add(Scores(system.name, task.name, metric, values, seed))
    return table
