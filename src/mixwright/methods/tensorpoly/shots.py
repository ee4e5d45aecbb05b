"""The few examples of a new task, in whatever form they come, as batches of any part of them."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from mixwright.backbones.hf import load_tokenizer, provenance
from mixwright.composition.model import ComposedModel
from mixwright.data.batches import Batches, make_batches
from mixwright.data.collate import Batch, Kind
from mixwright.data.tasks import TextTask, read_task, task_of

Examples = TextTask | str | Path | Sequence[Mapping[str, Any]] | Batches | Sequence[Batch]
ACCEPTED = (
    "a file, folder or hub id of rows, rows such as {'text': ..., 'label': ...} or {'prompt': ..., 'completion': ...}, "
    "a TextTask, Batches, or a list of Batch"
)


@dataclass(frozen=True)
class Shots:
    """Examples by their numbers: `labels` has each one's label, or None; `take` makes batches of some of them."""

    labels: tuple[Hashable, ...]
    take: Callable[[Sequence[int]], Batches]

    def __len__(self) -> int:
        return len(self.labels)

    def everything(self) -> Batches:
        """All of them."""
        return self.take(range(len(self)))


def read_shots(
    examples: Examples,
    model: ComposedModel,
    *,
    name: str,
    tokenizer: Any = None,
    labels: Sequence[str] | None = None,
    batch_size: int = 8,
    max_length: int = 512,
    seed: int = 0,
) -> Shots:
    """The examples, ready for a model of this kind. `tokenizer`: the one beside the backbone unless given.

    Raises ValueError for examples that are none of what is accepted, that are empty, or that the kind cannot learn
    from; what is wrong with a row is said with its file and line, or its number.
    """
    if isinstance(examples, Batches):
        return _of_batches(examples, seed)
    if isinstance(examples, str | Path):
        task = read_task(examples, labels=labels)
    elif isinstance(examples, TextTask):
        task = examples
    elif not isinstance(examples, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]  (a caller's)
        raise ValueError(f"task {name!r}: examples are a {type(examples).__name__}; expected {ACCEPTED}.")
    elif examples and all(isinstance(item, Batch) for item in examples):
        return _of_each(cast(Sequence[Batch], examples), seed)
    else:
        task = task_of(cast(Sequence[Mapping[str, Any]], examples), name=name, labels=labels)
    if not task.examples:
        raise ValueError(f"task {name!r}: no examples; give at least one.")
    kind, reader = kind_of(model), tokenizer or tokenizer_of(model)

    def take(numbers: Sequence[int]) -> Batches:
        some = TextTask(task.name, task.format, tuple(task.examples[number] for number in numbers), task.labels)
        size = min(batch_size, len(some))
        return make_batches(some, reader, kind, batch_size=size, seed=seed, max_length=max_length)

    return Shots(tuple(example.label for example in task.examples), take)


def kind_of(model: ComposedModel) -> Kind:
    """How the backbone reads text. Raises ValueError for one that reads none."""
    kind = provenance(model.backbone)["kind"]
    if kind not in ("causal", "seq2seq", "encoder"):
        raise ValueError(f"a backbone of kind {kind!r} reads no text; give the examples as Batches of your own.")
    return kind


def tokenizer_of(model: ComposedModel) -> Any:
    """The tokenizer beside the backbone. Raises ValueError for a backbone that has no folder."""
    known = model.composition.backbone
    if not known.get("path"):
        raise ValueError("the backbone was built in memory and has no tokenizer beside it; give tokenizer=.")
    return load_tokenizer(str(known["path"]), revision=known.get("revision"))


def deal(labels: Sequence[Hashable], folds: int, seed: int) -> list[list[int]]:
    """Numbers of examples in `folds` parts whose sizes, and whose counts of every label, differ by one at most."""
    draw = torch.Generator().manual_seed(seed)
    shuffled = [int(number) for number in torch.randperm(len(labels), generator=draw)]
    kinds = list(dict.fromkeys(labels))
    in_turn = sorted(shuffled, key=lambda number: kinds.index(labels[number]))  # stable: shuffled within a label
    return [sorted(in_turn[fold::folds]) for fold in range(folds)]


def _of_batches(batches: Batches, seed: int) -> Shots:
    def take(numbers: Sequence[int]) -> Batches:
        some = [batches.examples[number] for number in numbers]
        return Batches(some, batches.collate, batch_size=min(batches.batch_size, len(some)), seed=seed)

    return Shots(tuple(getattr(example, "label", None) for example in batches.examples), take)


def _of_each(batches: Sequence[Batch], seed: int) -> Shots:
    def take(numbers: Sequence[int]) -> Batches:
        return Batches([batches[number] for number in numbers], _itself, batch_size=1, seed=seed)

    return Shots((None,) * len(batches), take)


def _itself(rows: Sequence[Batch]) -> Batch:
    return rows[0]
