"""The twelve classification tasks of the real suite: rows from disk, token ids, and the label-matching loss.

A text belongs to the label whose words are nearest. **Labels are always embedded by the backbone alone.** They are the
fixed points on which experts that were trained apart agree, as the output vocabulary is for a language model; if each
expert moved the labels too, a mixture would compare texts and labels in spaces that nobody trained.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mixwright.composition.model import ComposedModel
from mixwright.evaluation.embedding import embed

HELD_IN = ("subj", "mpqa", "cr", "mr", "trec", "banking77", "clinc150", "emotion", "irony")
HELD_OUT = ("sst2", "ag_news", "tweet_sentiment")
TEMPERATURE = 0.05
MAX_TOKENS = 64
VALIDATION_ROWS = 200

Tokenise = Callable[[list[str]], dict[str, Tensor]]


@dataclass(frozen=True)
class TextRows:
    """Labelled texts."""

    texts: list[str]
    labels: Tensor


@dataclass(frozen=True)
class LabelledTask:
    """One task: its labels in words, its embedded labels (classes, width), and its three splits."""

    name: str
    words: list[str]
    anchors: Tensor
    train: TextRows
    validation: TextRows
    test: TextRows


def read_task(folder: Path, backbone: nn.Module, tokenise: Tokenise) -> LabelledTask:
    """A task from `task.json`, `train.jsonl` (its last 200 rows are the validation split) and `test.jsonl`."""
    words = json.loads((folder / "task.json").read_text())["labels"]
    with torch.no_grad():
        anchors = embed(backbone, tokenise(words))
    rows = _read(folder / "train.jsonl")
    cut = max(1, len(rows) - VALIDATION_ROWS)
    return LabelledTask(
        folder.name, words, anchors, _rows(rows[:cut]), _rows(rows[cut:]), _rows(_read(folder / "test.jsonl"))
    )


def _read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def _rows(rows: list[dict[str, object]]) -> TextRows:
    return TextRows([str(row["text"]) for row in rows], torch.tensor([int(str(row["label"])) for row in rows]))


def label_loss(tasks: list[LabelledTask], tokenise: Tokenise, rows: int, seed: int):
    """(model, step) -> mean cross-entropy of cosine / 0.05 against a task's label texts, one entry for one expert.

    With several tasks each step draws its batch from one of them in turn: a multitask adapter's loss.
    """

    def losses(model: ComposedModel, step: int) -> Tensor:
        task = tasks[step % len(tasks)]
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        chosen = torch.randint(len(task.train.texts), (rows,), generator=generator)
        batch = tokenise([task.train.texts[i] for i in chosen.tolist()])
        logits = embed(model, batch) @ task.anchors.T / TEMPERATURE
        return cross_entropy(logits, task.train.labels[chosen]).reshape(1)

    return losses
