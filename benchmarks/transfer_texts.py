"""Texts of the transfer suite as states: what the frozen lower layers of the backbone make of them is made once.

Only the uppermost layers are adapted, by every method alike, so that a training step costs those layers alone.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.text_tasks import TEMPERATURE, LabelledTask, TextRows, Tokenise
from mixwright.evaluation.embedding import embed
from mixwright.ops.mean_pool import sentence_embedding

HELD_IN_ROWS, VALIDATION_ROWS, SHOT_ROWS, TEST_ROWS = 600, 100, 400, 200


class Top(nn.Module):
    """The last layers of a BERT: from the states that reach them to its last states."""

    def __init__(self, backbone: Any, layers: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(backbone.encoder.layer[-layers:])
        self.eval()  # no dropout: a composed model takes this mode over

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> BaseModelOutput:
        shut = torch.zeros_like(attention_mask, dtype=hidden.dtype).masked_fill_(attention_mask == 0, -1e9)
        for layer in self.layer:
            hidden = layer(hidden, shut[:, None, None])
        return BaseModelOutput(last_hidden_state=hidden)


@dataclass(frozen=True)
class States:
    """Rows of states, one after the other without padding: row i is `flat[starts[i] : starts[i + 1]]`."""

    flat: Tensor
    starts: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: list[int]) -> dict[str, Tensor]:
        """A padded batch, as the arguments of `Top`."""
        spans = [(int(self.starts[i]), int(self.starts[i + 1])) for i in rows]
        longest = max(stop - start for start, stop in spans)
        hidden = torch.zeros(len(rows), longest, self.flat.shape[1])
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for number, (start, stop) in enumerate(spans):
            hidden[number, : stop - start] = self.flat[start:stop]
            mask[number, : stop - start] = 1
        return {"hidden": hidden, "attention_mask": mask}

    def batches(self, size: int) -> list[list[int]]:
        """All rows, sorted by length."""
        order = torch.argsort(self.starts.diff(), stable=True).tolist()
        return [order[start : start + size] for start in range(0, len(order), size)]


@dataclass(frozen=True)
class StateTask:
    """One task: its label texts as the backbone embeds them, and the states of its splits."""

    name: str
    anchors: Tensor
    train: States
    validation: States
    test: States


def together(parts: list[States]) -> States:
    """The rows of several, in order."""
    starts, labels = [parts[0].starts], torch.cat([part.labels for part in parts])
    for part in parts[1:]:
        starts.append(part.starts[1:] + starts[-1][-1])
    return States(torch.cat([part.flat for part in parts]), torch.cat(starts), labels)


def state_tasks(
    backbone: Any, tokenise: Tokenise, tasks: list[LabelledTask], layers: int, tokens: int, rows: dict[str, int]
) -> list[StateTask]:
    """The tasks with at most `rows` rows of each split, cut to `tokens` tokens; checked against the whole backbone."""
    made: list[StateTask] = []
    for task in tasks:
        splits: dict[str, States] = {}
        for split in ("train", "validation", "test"):
            splits[split] = _states(backbone, tokenise, getattr(task, split), layers, tokens, rows[split])
        _check(backbone, tokenise, task.test, splits["test"], layers, tokens)
        made.append(StateTask(task.name, task.anchors, **splits))
    return made


def _states(backbone: Any, tokenise: Tokenise, texts: TextRows, layers: int, tokens: int, count: int) -> States:
    count = min(count, len(texts.texts))
    pieces: list[Tensor] = [torch.empty(0)] * count
    order = sorted(range(count), key=lambda i: len(texts.texts[i]))
    with torch.inference_mode():
        for start in range(0, count, 50):
            part = order[start : start + 50]
            inputs = _cut(tokenise([texts.texts[i] for i in part]), tokens)
            below = backbone(**inputs, output_hidden_states=True).hidden_states[-1 - layers]
            for i, state, mask in zip(part, below, inputs["attention_mask"]):
                pieces[i] = state[mask.bool()].clone()
    lengths = torch.tensor([0, *(len(piece) for piece in pieces)])
    return States(torch.cat(pieces), lengths.cumsum(0), texts.labels[:count])


def _cut(inputs: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
    return {name: tensor[:, :tokens] for name, tensor in inputs.items()}


def _check(backbone: Any, tokenise: Tokenise, texts: TextRows, states: States, layers: int, tokens: int) -> None:
    with torch.inference_mode():
        inputs = _cut(tokenise(texts.texts[:16]), tokens)
        whole = sentence_embedding(backbone(**inputs).last_hidden_state, inputs["attention_mask"])
        ours = embed(Top(backbone, layers), states.take(list(range(16))))
    assert torch.allclose(whole, ours, atol=1e-4), f"cached states differ by {(whole - ours).abs().max():.1e}"


def save_tasks(path: Path, tasks: list[StateTask]) -> None:
    """All tasks in one file."""
    tensors: dict[str, Tensor] = {}
    for task in tasks:
        tensors[f"{task.name}/anchors"] = task.anchors
        for split in ("train", "validation", "test"):
            states: States = getattr(task, split)
            named = {"flat": states.flat, "starts": states.starts, "labels": states.labels}
            tensors |= {f"{task.name}/{split}/{name}": tensor.contiguous() for name, tensor in named.items()}
    fresh = path.with_suffix(".part")
    save_file(tensors, fresh)
    fresh.replace(path)


def load_tasks(path: Path) -> dict[str, StateTask]:
    """What `save_tasks` wrote, by name."""
    tensors = load_file(path)
    names = dict.fromkeys(name.split("/")[0] for name in tensors)

    def states(task: str, split: str) -> States:
        return States(*(tensors[f"{task}/{split}/{name}"] for name in ("flat", "starts", "labels")))

    return {
        name: StateTask(name, tensors[f"{name}/anchors"], *(states(name, s) for s in ("train", "validation", "test")))
        for name in names
    }


class Labels:
    """The label texts of several tasks side by side; a row of a batch sees its own task's only."""

    def __init__(self, tasks: list[StateTask]) -> None:
        self.anchors = torch.cat([task.anchors for task in tasks])
        counts = torch.tensor([len(task.anchors) for task in tasks])
        self.first = counts.cumsum(0) - counts
        self.owner = torch.repeat_interleave(torch.arange(len(tasks)), counts)

    def logits(self, embedded: Tensor, task_ids: Tensor) -> Tensor:
        """cosine / 0.05; labels of other tasks are out of the question."""
        scores = embedded @ self.anchors.T / TEMPERATURE
        return scores.masked_fill(self.owner != task_ids[:, None], -torch.inf)

    def loss(self, embedded: Tensor, labels: Tensor, task_ids: Tensor) -> Tensor:
        """Mean cross-entropy."""
        return cross_entropy(self.logits(embedded, task_ids), labels + self.first[task_ids])
