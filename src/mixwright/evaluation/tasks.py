"""From files to tasks and from names to systems: what the command line and `mw.evaluate` share."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from mixwright.backbones.hf import provenance
from mixwright.composition.by_task import task_id, task_names
from mixwright.composition.model import ComposedModel
from mixwright.data.batches import make_batches
from mixwright.data.collate import Batch, Kind, Tokenizer
from mixwright.data.tasks import TextTask, read_task
from mixwright.evaluation import systems
from mixwright.evaluation.hybrid_rows import mixes_models
from mixwright.evaluation.scores import AbstractTask, LabelTask, TokenTask
from mixwright.evaluation.systems import System
from mixwright.experts.lora import LoraExperts

NAMES = ("backbone", "experts", "ensemble", "merged", "average", "random", "arrow", "spectr", "routed")
"""What `chosen_systems` knows, in the order of the table. `experts` is one system for each of them."""

OF_LORA = tuple(name for name in NAMES if name != "ensemble")
"""Those of them that are measured of LoRA experts unless others are named: an ensemble runs the model for each."""

OF_ANY_EXPERTS = ("backbone", "average", "routed")
"""Those of them that need no LoRA experts."""

OF_WHOLE_MODELS = ("experts", "ensemble", "average", "routed")
"""Those of them for experts each of which is a whole model: what is left without them is one of them."""

OF_NEURONS = ("backbone", "routed")
"""Those of them that need no experts with names."""

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
    of_tasks: Sequence[str | int] | None = None,
) -> list[AbstractTask]:
    """One task for each file (or folder with a test split, or hub id), in the form that the model's kind reads.

    For a model that is routed by task: `of_tasks` are the tasks it knows that the files are of, one for each or one for
    all; without it the files' names are theirs. Raises ValueError for a file that cannot be read, or not in this form,
    naming file and line, and for a task that the model does not know.
    """
    kind = kind_of(model)
    texts = [read_task(file, split="test", limit=limit) for file in files]
    ids = _task_ids(model, [text.name for text in texts], of_tasks)
    return [_task(text, of, tokenizer, kind, batch_size, max_length) for text, of in zip(texts, ids, strict=True)]


def _task_ids(model: ComposedModel, names: Sequence[str], given: Sequence[str | int] | None) -> list[int | None]:
    """The task of each file, as the model numbers them; None where it is not routed by task."""
    known = task_names(model)
    if given is not None and len(given) not in (1, len(names)):
        raise ValueError(f"{len(given)} tasks for {len(names)} files; give one for each file, or one for all.")
    if not known and given is None:
        return [None] * len(names)
    if given is None:
        strange = [name for name in names if name not in known]
        if strange:
            raise ValueError(
                f"{strange[0]} is no task of this model ({', '.join(known[:10])}); say of which task each file is."
            )
    wanted = list(given or names)
    return [task_id(model, task) for task in (wanted * len(names) if len(wanted) == 1 else wanted)]


def _task(
    task: TextTask, of: int | None, tokenizer: Tokenizer, kind: Kind, batch_size: int, max_length: int
) -> AbstractTask:
    batches = make_batches(task, tokenizer, kind, batch_size=batch_size, seed=0, max_length=max_length)
    each = [_of_task(batches.take(part), of) for part in batches.in_order()]
    return LabelTask(task.name, each) if kind == "encoder" else TokenTask(task.name, each)


def _of_task(batch: Batch, task: int | None) -> Batch:
    """The same batch, saying of which task its rows and its label texts are."""
    if task is None:
        return batch
    labels = 0 if batch.label_inputs is None else len(batch.label_inputs["input_ids"])
    rows, texts = (torch.full((count,), task) for count in (len(batch.targets), labels))
    return replace(batch, task_ids=rows, label_task_ids=texts if labels else None)


def kind_of(model: ComposedModel) -> Kind:
    """causal, seq2seq or encoder. Raises ValueError for a backbone that reads no text."""
    kind = model.composition.backbone.get("kind") or provenance(model.backbone)["kind"]
    if kind not in METRIC:
        raise ValueError(f"a backbone of kind {kind!r} reads no text; evaluation knows {', '.join(METRIC)}.")
    return cast(Kind, kind)


def chosen_systems(model: ComposedModel, names: Sequence[str] = NAMES, *, seed: int = 0) -> list[System]:
    """The systems of these names, in the order of `NAMES`. Raises ValueError for a name that is none of them."""
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ValueError(f"no system is called {unknown[0]!r}; there are {', '.join(NAMES)}.")
    makers = {
        "backbone": lambda: [systems.backbone()],
        "experts": lambda: systems.single_experts(model),
        "ensemble": lambda: [systems.ensemble(model)],
        "merged": lambda: [systems.merged(model)],
        "average": lambda: [systems.parameter_average(model)],
        "random": lambda: [systems.random_prototypes(model, _two(model), seed)],
        "arrow": lambda: [systems.arrow(model, _two(model))],
        "spectr": lambda: [systems.spectral(model, 1)],
        "routed": lambda: [systems.composed()],
    }
    return [system for name in NAMES if name in names for system in makers[name]()]


def default_systems(model: ComposedModel) -> tuple[str, ...]:
    """The names of the systems that these experts allow: all but the ensemble for LoRA experts."""
    if not model.experts:
        return OF_NEURONS
    if mixes_models(model):
        return OF_WHOLE_MODELS
    is_lora = all(isinstance(mixture.experts, LoraExperts) for mixture in model.mixtures.values())
    return OF_LORA if is_lora else OF_ANY_EXPERTS


def _two(model: ComposedModel) -> int:
    return min(2, len(systems.members(model)))
