"""Several tasks in one sequence of batches; every row says which task it is of.

The loss of a mixed batch is that of its rows, each under its own task. Rows of causal and sequence-to-sequence models
differ in their task alone; an encoder's row may match the label texts of its own task only.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, cast

import torch

from mixwright.data.batches import Batches, digest_of, pack
from mixwright.data.collate import Batch, Kind, Paired, Prompted, Tokenizer, causal, inputs_of, padded_inputs
from mixwright.data.order import MixedOrder
from mixwright.data.tasks import Example, TextTask

Row = tuple[int, Any]
"""The number of a task in the mixture, and an example of it (or packed token ids)."""


@dataclass(frozen=True)
class Mixed:
    """Rows of several tasks as one batch; `ids`, in the mixture's order, are what the model knows the tasks by."""

    collate: Callable[[Sequence[Row], Sequence[int]], Batch]
    ids: tuple[int, ...]

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """The batch of these rows."""
        batch = self.collate(rows, self.ids)
        return replace(batch, task_ids=torch.tensor([self.ids[task] for task, _ in rows]))


def mix_batches(
    tasks: Sequence[TextTask],
    tokenizer: Tokenizer,
    kind: Kind,
    *,
    batch_size: int,
    seed: int,
    temperature: float = 1.0,
    cap: int | None = None,
    max_length: int = 512,
    max_target_length: int | None = None,
) -> Batches:
    """The batches in which a model of `kind` learns several tasks at once; task ids are the places in `tasks`.

    A task's share of the rows is proportional to min(size, cap)^(1/temperature); packed text counts in rows.
    Raises ValueError for two tasks of one name, one without examples, and a format that the kind cannot learn from.
    """
    names = [task.name for task in tasks]
    _check(tasks, names, kind)
    rows = [_rows(task, tokenizer, kind, max_length) for task in tasks]
    digests = [digest_of(task, tokenizer, kind, max_length, max_target_length) for task in tasks]
    text = json.dumps([names, digests, temperature, cap])
    sizes = [len(of_task) for of_task in rows]
    return Batches(
        [(number, row) for number, of_task in enumerate(rows) for row in of_task],
        Mixed(_collate(tasks, tokenizer, kind, max_length, max_target_length), tuple(range(len(tasks)))),
        batch_size=batch_size,
        seed=seed,
        digest=hashlib.sha256(text.encode()).hexdigest(),
        order=MixedOrder(sizes, seed, temperature=temperature, cap=cap),
        tasks=dict(zip(names, sizes, strict=True)),
    )


def numbered(batches: Batches, known: Sequence[str]) -> Batches:
    """The same batches with the task ids of a model that knows the tasks `known`, in this order.

    Batches that name no tasks stay as they are. Raises ValueError for a task that the model does not know.
    """
    if not batches.tasks or not isinstance(batches.collate, Mixed):
        return batches
    strange = [name for name in batches.tasks if name not in known]
    if strange:
        raise ValueError(f"task {strange[0]!r} is unknown to the model; it knows {', '.join(known) or 'none'}.")
    return Batches(
        batches.examples,
        Mixed(batches.collate.collate, tuple(known.index(name) for name in batches.tasks)),
        batch_size=batches.batch_size,
        seed=0,
        digest=batches.digest,
        order=batches.order,
        tasks=batches.tasks,
    )


def _check(tasks: Sequence[TextTask], names: Sequence[str], kind: Kind) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two tasks are called {twice[0]!r}; every task of a mixture needs a name of its own.")
    for task in tasks:
        if not task.examples:
            raise ValueError(f"task {task.name!r} has no examples; every task of a mixture needs one.")
        if kind == "encoder" and task.format != "label":
            raise ValueError(f"task {task.name!r}: a sentence encoder learns from text/label rows, not {task.format}.")
        if kind == "seq2seq" and task.format == "text":
            raise ValueError(f"task {task.name!r}: plain text trains causal models only, and this one is {kind}.")


def _rows(task: TextTask, tokenizer: Tokenizer, kind: Kind, max_length: int) -> Sequence[Any]:
    if task.format != "text":
        return task.examples
    return pack([tokenizer(e.text)["input_ids"] for e in task.examples], tokenizer.eos_token_id, max_length)


def _collate(
    tasks: Sequence[TextTask], tokenizer: Tokenizer, kind: Kind, max_length: int, max_target_length: int | None
) -> Callable[[Sequence[Row], Sequence[int]], Batch]:
    labels = [task.labels for task in tasks]
    if kind == "encoder":
        return OwnLabels(tokenizer, labels, max_length)
    if kind == "causal":
        return Continued(Prompted(tokenizer, (), max_length, max_target_length), labels)
    return Answered(Paired(tokenizer, (), max_length, max_target_length or max_length), labels)


@dataclass(frozen=True)
class Continued:
    """Rows for a causal model: prompts with completions, labels in words, and packed text, side by side."""

    prompted: Prompted
    labels: Sequence[tuple[str, ...]]

    def __call__(self, rows: Sequence[Row], ids: Sequence[int]) -> Batch:
        """The batch of these rows."""
        del ids
        asked = [_in_words(row, self.labels[task], "\n") for task, row in rows if isinstance(row, Example)]
        joined = iter(self.prompted.joined(asked) if asked else [])
        tokens = [next(joined) if isinstance(row, Example) else (list(row), 1) for _, row in rows]
        return causal(tokens, self.prompted.tokenizer, tuple(example.where for example in asked))


@dataclass(frozen=True)
class Answered:
    """Rows for an encoder with a decoder: prompts to completions, texts to their labels in words."""

    paired: Paired
    labels: Sequence[tuple[str, ...]]

    def __call__(self, rows: Sequence[Row], ids: Sequence[int]) -> Batch:
        """The batch of these rows."""
        del ids
        return self.paired([_in_words(row, self.labels[task]) for task, row in rows])


class OwnLabels:
    """Texts, and the label texts of the tasks that they are of, each with its task's id."""

    def __init__(self, tokenizer: Tokenizer, labels: Sequence[Sequence[str]], max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.tokens = [inputs_of(tokenizer, texts, max_length) for texts in labels]

    def __call__(self, rows: Sequence[Row], ids: Sequence[int]) -> Batch:
        """The batch of these rows; targets count through the label texts of the batch."""
        present = sorted({task for task, _ in rows})
        sizes = [len(self.tokens[task]) for task in present]
        first = dict(zip(present, accumulate([0, *sizes]), strict=False))
        examples = [cast(Example, row) for _, row in rows]
        return Batch(
            "encoder",
            padded_inputs(self.tokenizer, inputs_of(self.tokenizer, [e.text for e in examples], self.max_length)),
            torch.tensor([first[task] + (row.label or 0) for task, row in rows]),
            len(rows),
            padded_inputs(self.tokenizer, [text for task in present for text in self.tokens[task]]),
            tuple(example.where for example in examples),
            label_task_ids=torch.tensor([ids[t] for t, n in zip(present, sizes, strict=True) for _ in range(n)]),
        )


def _in_words(example: Example, labels: tuple[str, ...], ending: str = "") -> Example:
    """A labelled example as text and target, the label's own text; `ending` closes the text."""
    if example.label is None:
        return example
    return replace(example, text=f"{example.text}{ending}", target=labels[example.label], label=None)
