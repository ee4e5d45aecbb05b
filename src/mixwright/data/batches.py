"""Batches without end: which examples, in which order, is a function of the seed and the batch's number."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from mixwright.data.collate import Batch, Kind, Labelled, Packed, Paired, Prompted, Tokenizer
from mixwright.data.order import MixedOrder, Order
from mixwright.data.tasks import TextTask


class Batches:
    """Batch after batch, without end; `batch(i)` is a function of (examples, seed, i).

    `collate` turns examples into a batch. `digest` names the data and how they are read. `tasks`: where the examples
    are those of several tasks, one task after another, the name of each and how many it has.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        collate: Callable[[Sequence[Any]], Batch],
        *,
        batch_size: int,
        seed: int,
        digest: str = "",
        order: Order | MixedOrder | None = None,
        tasks: Mapping[str, int] | None = None,
    ) -> None:
        self.examples = examples
        self.collate = collate
        self.batch_size = batch_size
        self.order = order or Order(len(examples), seed)
        self.digest = digest
        self.tasks = dict(tasks or {})

    def __len__(self) -> int:
        """Examples in one pass."""
        return len(self.examples)

    def batch(self, index: int) -> Batch:
        """The batch at `index` of the endless shuffled sequence."""
        first = index * self.batch_size
        rows = [self.examples[self.order.at(position)] for position in range(first, first + self.batch_size)]
        return self.collate(rows)

    def in_order(self, first: int = 0, stride: int = 1) -> "list[slice]":
        """Every example once, unshuffled: the slices of every `stride`-th batch, beginning with batch `first`.

        No batch holds examples of two tasks.
        """
        ends = list(accumulate(self.tasks.values() or [len(self.examples)]))
        spans = zip([0, *ends], ends, strict=False)
        starts = [(at, end) for begin, end in spans for at in range(begin, end, self.batch_size)]
        return [slice(at, min(at + self.batch_size, end)) for at, end in starts[first::stride]]

    def task_of(self, part: slice) -> str:
        """The name of the task of a slice of `in_order`; empty where tasks have none."""
        ends = accumulate(self.tasks.values())
        return next((name for name, end in zip(self.tasks, ends, strict=True) if part.start < end), "")

    def take(self, part: slice) -> Batch:
        """The batch of the examples in a slice of `in_order`."""
        return self.collate(self.examples[part])

    def spread(self, count: int) -> Batch:
        """The batch of up to `count` examples from all over the data."""
        return self.collate(self.examples[:: -(-len(self.examples) // count)])


def make_batches(
    task: TextTask,
    tokenizer: Tokenizer,
    kind: Kind,
    *,
    batch_size: int,
    seed: int,
    max_length: int = 512,
    max_target_length: int | None = None,
) -> Batches:
    """The batches in which a model of `kind` learns `task`.

    causal: a prompt is read and only the completion and the end count; plain text is packed into rows of `max_length`
    tokens. seq2seq: prompt to completion, or text to label text. encoder: text to the nearest label text.

    Raises ValueError for a format that the kind cannot learn from.
    """
    digest = digest_of(task, tokenizer, kind, max_length, max_target_length)
    examples: Sequence[Any] = task.examples
    if task.format == "text":
        if kind != "causal":
            raise ValueError(
                f"{task.name}: plain text trains causal models only, and this one is {kind}; "
                "give prompt/completion" + (" or text/label." if kind == "seq2seq" else " as text/label.")
            )
        examples = pack(
            [tokenizer(example.text)["input_ids"] for example in examples], tokenizer.eos_token_id, max_length
        )
        collate: Callable[[Sequence[Any]], Batch] = Packed(tokenizer)
    elif kind == "encoder":
        if task.format != "label":
            raise ValueError(
                f"{task.name}: a sentence encoder learns from text/label rows, and these are prompt/completion."
            )
        collate = Labelled(tokenizer, task.labels, max_length)
    elif kind == "causal":
        collate = Prompted(tokenizer, task.labels, max_length, max_target_length)
    else:
        collate = Paired(tokenizer, task.labels, max_length, max_target_length or max_length)
    return Batches(examples, collate, batch_size=batch_size, seed=seed, digest=digest)


def pack(documents: Sequence[Sequence[int]], end: int | None, length: int) -> list[list[int]]:
    """Documents one after another, each closed by `end`, cut into rows of `length` tokens; a last row may be shorter.

    Raises ValueError when there are not two tokens in all.
    """
    stream: list[int] = []
    for document in documents:
        stream.extend(document)
        if end is not None and (not document or document[-1] != end):
            stream.append(end)
    rows = [stream[start : start + length] for start in range(0, len(stream), length)]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise ValueError(f"the text has {len(stream)} tokens; a model that predicts the next token needs two or more.")
    return rows


def digest_of(task: TextTask, tokenizer: Tokenizer, kind: Kind, *lengths: int | None) -> str:
    """A name for what a model of `kind` reads of these examples."""
    digest = hashlib.sha256(json.dumps([kind, task.format, task.labels, lengths]).encode())
    for example in task.examples:
        digest.update(json.dumps([example.text, example.target, example.label]).encode())
    probe = tokenizer(["The quick brown fox, 12345.", "\u00e9\u4e16 {x}\n"])["input_ids"]
    digest.update(json.dumps([[int(token) for token in row] for row in probe]).encode())
    return digest.hexdigest()
