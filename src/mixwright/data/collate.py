"""Examples as padded token ids, by the kind of model that reads them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from mixwright.data.tasks import Example

Kind = Literal["causal", "seq2seq", "encoder"]
IGNORED = -100


class Tokenizer(Protocol):
    """What is asked of a tokenizer; those of transformers answer it."""

    pad_token_id: int | None
    eos_token_id: int | None

    def __call__(self, text: Any = None, **kwargs: Any) -> Mapping[str, Any]:
        """`input_ids` of the text."""
        ...


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass: `inputs` for the model, `targets` it should give, and how many of them count (`weight`).

    causal: inputs and targets `(batch, seq)`, target t is the token after input t, -100 where none counts. seq2seq:
    targets `(batch, target_seq)`. encoder: targets `(batch,)` are label numbers, `label_inputs` the label texts.
    `task_ids` `(batch,)`: the task of each row, where rows of several tasks stand together; `label_task_ids`
    `(labels,)`: the task of each label text, which only rows of that task may match.
    """

    kind: Kind
    inputs: Mapping[str, Tensor]
    targets: Tensor
    weight: int
    label_inputs: Mapping[str, Tensor] | None = None
    where: tuple[str, ...] = ()
    task_ids: Tensor | None = None
    label_task_ids: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        labels = self.label_inputs and {name: tensor.to(device) for name, tensor in self.label_inputs.items()}
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        rows, texts = (None if ids is None else ids.to(device) for ids in (self.task_ids, self.label_task_ids))
        return replace(
            self,
            inputs=inputs,
            targets=self.targets.to(device),
            label_inputs=labels,
            task_ids=rows,
            label_task_ids=texts,
        )


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows of packed text: every token but the first counts."""

    tokenizer: Tokenizer

    def __call__(self, rows: Sequence[Sequence[int]]) -> Batch:
        """The batch of these rows."""
        return causal([(list(row), 1) for row in rows], self.tokenizer)


@dataclass(frozen=True, slots=True)
class Prompted:
    """Prompt and completion in one row; the completion and the end count. A label is completed on a line of its own."""

    tokenizer: Tokenizer
    labels: tuple[str, ...]
    max_length: int
    max_target_length: int | None

    def __call__(self, rows: Sequence[Example]) -> Batch:
        """The batch of these examples."""
        return causal(self.joined(rows), self.tokenizer, tuple(example.where for example in rows))

    def joined(self, rows: Sequence[Example]) -> list[tuple[list[int], int]]:
        """For each example its token ids, and the place of the first that counts."""
        prompts = [example.text if example.label is None else f"{example.text}\n" for example in rows]
        starts = self.tokenizer(prompts)["input_ids"]
        ends = self.tokenizer([_target(e, self.labels) for e in rows], add_special_tokens=False)["input_ids"]
        return [self._join(start, end) for start, end in zip(starts, ends, strict=True)]

    def _join(self, start: Sequence[int], end: Sequence[int]) -> tuple[list[int], int]:
        """Of a row that is too long the completion stays; the prompt loses its beginning."""
        eos = self.tokenizer.eos_token_id
        prompt = list(start[:-1] if start and start[-1] == eos else start)
        room = min(self.max_target_length or self.max_length - 1, self.max_length - 1)
        completion = [*end, *([] if eos is None else [eos])][:room]
        kept = prompt[max(0, len(prompt) - (self.max_length - len(completion))) :]
        return kept + completion, len(kept)


@dataclass(frozen=True, slots=True)
class Paired:
    """Prompt to completion, or text to label text, for an encoder with a decoder."""

    tokenizer: Tokenizer
    labels: tuple[str, ...]
    max_length: int
    max_target_length: int

    def __call__(self, rows: Sequence[Example]) -> Batch:
        """The batch of these examples."""
        inputs = _inputs(self.tokenizer, [example.text for example in rows], self.max_length)
        wanted = self.tokenizer(
            text_target=[_target(example, self.labels) for example in rows],
            truncation=True,
            max_length=self.max_target_length,
        )["input_ids"]
        targets = _pad(wanted, IGNORED)
        return Batch("seq2seq", inputs, targets, int((targets != IGNORED).sum()), where=tuple(e.where for e in rows))


class Labelled:
    """Texts, and the texts of all labels that they may match."""

    def __init__(self, tokenizer: Tokenizer, labels: Sequence[str], max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.label_inputs = _inputs(tokenizer, labels, max_length)

    def __call__(self, rows: Sequence[Example]) -> Batch:
        """The batch of these examples."""
        inputs = _inputs(self.tokenizer, [example.text for example in rows], self.max_length)
        targets = torch.tensor([-1 if example.label is None else example.label for example in rows])
        return Batch("encoder", inputs, targets, len(rows), self.label_inputs, tuple(example.where for example in rows))


def _target(example: Example, labels: tuple[str, ...]) -> str:
    return labels[example.label] if example.label is not None else example.target or ""


def causal(rows: Sequence[tuple[list[int], int]], tokenizer: Tokenizer, where: tuple[str, ...] = ()) -> Batch:
    """A batch of rows of token ids, each with the place of its first token that counts."""
    ids = _pad([row for row, _ in rows], _pad_id(tokenizer))
    mask = _pad([[1] * len(row) for row, _ in rows], 0)
    targets = _pad([_next_tokens(row, first) for row, first in rows], IGNORED)
    return Batch(
        "causal", {"input_ids": ids, "attention_mask": mask}, targets, int((targets != IGNORED).sum()), where=where
    )


def _next_tokens(row: list[int], first: int) -> list[int]:
    """Target t is token t + 1 where that token is at `first` or later."""
    return [token if position >= first else IGNORED for position, token in enumerate(row[1:], 1)] + [IGNORED]


def inputs_of(tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """The token ids of each text, cut at `max_length`."""
    return tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]


def padded_inputs(tokenizer: Tokenizer, ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Token ids of several lengths as a model's inputs."""
    return {"input_ids": _pad(ids, _pad_id(tokenizer)), "attention_mask": _pad([[1] * len(row) for row in ids], 0)}


def _inputs(tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> dict[str, Tensor]:
    return padded_inputs(tokenizer, inputs_of(tokenizer, texts, max_length))


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max((len(row) for row in rows), default=0)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long)


def _pad_id(tokenizer: Tokenizer) -> int:
    """Padding is masked, so any id will do for a tokenizer that has none."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
