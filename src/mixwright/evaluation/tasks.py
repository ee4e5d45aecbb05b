"""From files to tasks and from names to systems: what the command line and `mw.evaluate` share."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from mixwright.backbones.hf import provenance
from mixwright.composition.model import ComposedModel
from mixwright.data.batches import make_batches
from mixwright.data.collate import Kind, Tokenizer
from mixwright.data.tasks import TextTask, read_task
from mixwright.evaluation import systems
from mixwright.evaluation.scores import AbstractTask, LabelTask, TokenTask
from mixwright.evaluation.systems import System

NAMES = ("backbone", "experts", "merged", "average", "random", "arrow", "spectr", "routed")
"""What `chosen_systems` knows, in the order of the table. `experts` is one system for each of them."""

METRIC = {"causal": "nats", "seq2seq": "nats", "encoder": "accuracy"}
"""Kind of model -> the metric that decides."""


def file_tasks(
    model: ComposedModel,
    tokenizer: Tokenizer,
    files: Sequence[str | Path],
    *,
    batch_size: int = 16,
    max_length: int = 512,
    limit: int | None = None,
) -> list[AbstractTask]:
    """One task for each file (or folder with a test split, or hub id), in the form that the model's kind reads.

    Raises ValueError for a file that cannot be read, or not in this form, naming file and line.
    """
    kind = kind_of(model)
    found: list[AbstractTask] = []
    for file in files:
        task = read_task(file, split="test", limit=limit)
        found.append(_task(task, tokenizer, kind, batch_size, max_length))
    return found


def _task(task: TextTask, tokenizer: Tokenizer, kind: Kind, batch_size: int, max_length: int) -> AbstractTask:
    batches = make_batches(task, tokenizer, kind, batch_size=batch_size, seed=0, max_length=max_length)
    each = [batches.take(part) for part in batches.in_order()]
    return LabelTask(task.name, each) if kind == "encoder" else TokenTask(task.name, each)


def kind_of(model: ComposedModel) -> Kind:
    """causal, seq2seq or encoder. Raises ValueError for a backbone that reads no text."""
    kind = provenance(model.backbone)["kind"]
    if kind not in METRIC:
        raise ValueError(f"a backbone of kind {kind!r} reads no text; evaluation knows {', '.join(METRIC)}.")
    return cast(Kind, kind)


def chosen_systems(model: ComposedModel, names: Sequence[str] = NAMES, *, seed: int = 0) -> list[System]:
    """The systems of these names, in the order of `NAMES`. Raises ValueError for a name that is none of them."""
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ValueError(f"no system is called {unknown[0]!r}; there are {', '.join(NAMES)}.")
    top_k = min(2, len(systems.members(model)))
    makers = {
        "backbone": lambda: [systems.backbone()],
        "experts": lambda: systems.single_experts(model),
        "merged": lambda: [systems.merged(model)],
        "average": lambda: [systems.parameter_average(model)],
        "random": lambda: [systems.random_prototypes(model, top_k, seed)],
        "arrow": lambda: [systems.arrow(model, top_k)],
        "spectr": lambda: [systems.spectral(model, 1)],
        "routed": lambda: [systems.composed()],
    }
    return [system for name in NAMES if name in names for system in makers[name]()]
