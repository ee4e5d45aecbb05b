"""Held-out texts as documents, and the loss of whoever reads them: sums by document and by place in the text.

A document is what is drawn again for an interval: rows that are cut from one text stand or fall together. A file that
is one text has no documents to draw from, so its rows stand for them, which makes intervals of it too narrow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixwright.data.batches import pack
from mixwright.data.collate import IGNORED, Batch, Packed, Prompted
from mixwright.data.tasks import TextTask, read_task
from mixwright.evaluation.intervals import Interval, interval, resampled_means
from mixwright.evaluation.scores import token_losses

PLACES = (0, 32, 128, 512)
"""Where in a row the stretches begin whose tokens are told apart: what a model makes of more context."""


@dataclass(frozen=True, kw_only=True)
class Documents:
    """`batches` of rows in order; `document` of each row; `files` and `tokens` (documents, places) of each document.

    `cut`: files that are one text, whose rows are counted as documents.
    """

    batches: list[Batch]
    document: Int[Tensor, " rows"]
    files: list[str]
    tokens: Float[Tensor, "documents places"]
    cut: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.files)


def read_documents(
    files: Sequence[str | Path],
    tokenizer: Any,
    *,
    batch_size: int = 16,
    max_length: int = 512,
    limit: int | None = None,
) -> Documents:
    """The documents of files as `read_task` reads them, at most `limit` of each. Raises what `read_task` raises."""
    return documents_of(
        [read_task(file, split="test", limit=limit) for file in files],
        tokenizer,
        batch_size=batch_size,
        max_length=max_length,
        limit=limit,
    )


def documents_of(
    tasks: Sequence[TextTask], tokenizer: Any, *, batch_size: int = 16, max_length: int = 512, limit: int | None = None
) -> Documents:
    """The same of texts in memory: plain texts, or prompts whose completions count."""
    batches: list[Batch] = []
    document: list[int] = []
    files: list[str] = []
    cut: list[str] = []
    for task, name in zip(tasks, _names(tasks)):
        if task.format == "text":
            rows, of = _rows(task, tokenizer, max_length)
            if len(set(of)) == 1 and len(rows) > 1:
                rows, of, cut = rows[:limit], list(range(len(rows[:limit]))), [*cut, name]
            collate: Any = Packed(tokenizer)
        else:
            rows, of = list(task.examples), list(range(len(task.examples)))
            collate = Prompted(tokenizer, task.labels, max_length, None)
        document += [len(files) + number for number in of]
        files += [name] * (max(of) + 1)
        batches += [collate(rows[at : at + batch_size]) for at in range(0, len(rows), batch_size)]
    numbers = torch.tensor(document)
    counted = [(batch.targets != IGNORED).double() for batch in batches]
    return Documents(
        batches=batches, document=numbers, files=files, tokens=_summed(counted, numbers, len(files)), cut=tuple(cut)
    )


def _names(tasks: Sequence[TextTask]) -> list[str]:
    """The names of tasks, numbered where two are called the same."""
    names = [task.name for task in tasks]
    return [n if names.count(n) == 1 else f"{n} ({names[: at + 1].count(n)})" for at, n in enumerate(names)]


def _rows(task: TextTask, tokenizer: Any, max_length: int) -> tuple[list[list[int]], list[int]]:
    """Rows of at most `max_length` tokens, none of two texts, and the number of the text that each is of.

    Raises ValueError where no text has two tokens.
    """
    rows: list[list[int]] = []
    of: list[int] = []
    texts = 0
    for example in task.examples:
        ids = list(tokenizer(example.text)["input_ids"])
        if len(ids) + (tokenizer.eos_token_id is not None) < 2:
            continue
        own = pack([ids], tokenizer.eos_token_id, max_length)
        rows, of, texts = [*rows, *own], [*of, *[texts] * len(own)], texts + 1
    if not rows:
        raise ValueError(f"{task.name}: no text of two tokens or more; a loss needs a token that is predicted.")
    return rows, of


@torch.no_grad()
def losses(speaker: Any, documents: Documents) -> Float[Tensor, "documents places"]:
    """The loss of every document in nats, by the stretch of its row; float64. `speaker` is called as the model is."""
    device = next(speaker.parameters(), torch.zeros(())).device
    found = [token_losses(speaker, batch.to(device), None)[0].double().cpu() for batch in documents.batches]
    return _summed(found, documents.document, len(documents))


def _summed(parts: Sequence[Float[Tensor, "rows seq"]], document: Tensor, count: int) -> Tensor:
    """Sums over the tokens of each row's stretches, then over each document's rows."""
    by_row = [
        torch.stack([part[:, a:b].sum(-1) for a, b in zip(PLACES, (*PLACES[1:], None), strict=True)], -1)
        for part in parts
    ]
    return torch.zeros(count, len(PLACES), dtype=torch.float64).index_add(0, document, torch.cat(by_row))


def per_token(sums: Float[Tensor, "*documents"], tokens: Float[Tensor, "*documents"]) -> float:
    """Nats per token over all documents given."""
    return float(sums.sum() / tokens.sum())


def change(
    ours: Float[Tensor, "documents places"],
    theirs: Float[Tensor, "documents places"],
    tokens: Float[Tensor, "documents places"],
) -> Interval:
    """Nats per token of `ours` minus `theirs`, with documents drawn again, the same ones for both."""
    drawn = resampled_means(torch.stack([(ours - theirs).sum(-1), tokens.sum(-1)]))
    return interval(per_token(ours - theirs, tokens), drawn[:, 0] / drawn[:, 1], len(tokens))
