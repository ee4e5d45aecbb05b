"""Texts of the transfer suite as states: what the frozen lower layers of the backbone make of them is made once.

Only what comes after the last attention is adapted, by every method alike, so that a step costs those layers alone.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.text_tasks import TEMPERATURE, LabelledTask, TextRows, Tokenise
from mixwright.evaluation.embedding import embed
from mixwright.ops.mean_pool import sentence_embedding

HELD_IN_ROWS, VALIDATION_ROWS, SHOT_ROWS, TEST_ROWS = 600, 100, 400, 200


class Top(nn.Module):
    """A BERT after the attention of its last layer: from what that attended to, and what it adds it to, to last states.

    The linear layers that are left, and that every method adapts: the output of attention, and both of the perceptron.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        last = backbone.encoder.layer[-1]
        self.layer = nn.ModuleDict({"attention": last.attention.output, "up": last.intermediate, "down": last.output})
        self.eval()  # no dropout: a composed model takes this mode over

    def forward(self, states: Tensor, attention_mask: Tensor) -> BaseModelOutput:
        del attention_mask  # for the routers
        context, below = states.chunk(2, -1)
        attended = self.layer["attention"](context, below)
        return BaseModelOutput(last_hidden_state=self.layer["down"](self.layer["up"](attended), attended))


@dataclass(frozen=True)
class States:
    """Rows of states, one after the other without padding: row i is `flat[starts[i] : starts[i + 1]]`."""

    flat: Tensor
    starts: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def padded(self, rows: list[int]) -> dict[str, Tensor]:
        """A batch with a row for each text, as the arguments of `Top`."""
        pieces = [self.flat[self.starts[i] : self.starts[i + 1]] for i in rows]
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(p), dtype=torch.long) for p in pieces], batch_first=True)
        return {"states": nn.utils.rnn.pad_sequence(pieces, batch_first=True), "attention_mask": mask}

    def embed_packed(self, model: Any, rows: list[int]) -> Tensor:
        """Sentence embeddings of texts of one task, all in one row without padding."""
        pieces = [self.flat[self.starts[i] : self.starts[i + 1]] for i in rows]
        states = torch.cat(pieces)[None]
        owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(piece) for piece in pieces]))
        last = model(states=states, attention_mask=torch.ones(states.shape[:2], dtype=torch.long)).last_hidden_state[0]
        return normalize(torch.zeros(len(rows), last.shape[1]).index_add(0, owner, last), dim=-1)

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
    backbone: Any, tokenise: Tokenise, tasks: list[LabelledTask], tokens: int, rows: dict[str, int]
) -> list[StateTask]:
    """The tasks with at most `rows` rows of each split, cut to `tokens` tokens; checked against the whole backbone."""
    made: list[StateTask] = []
    for task in tasks:
        splits: dict[str, States] = {}
        for split in ("train", "validation", "test"):
            splits[split] = states_of(backbone, tokenise, getattr(task, split), tokens, rows[split])
        _check(backbone, tokenise, task.test, splits["test"], tokens)
        made.append(StateTask(task.name, task.anchors, **splits))
    return made


def states_of(backbone: Any, tokenise: Tokenise, texts: TextRows, tokens: int, count: int) -> States:
    """The states of the first `count` texts."""
    count = min(count, len(texts.texts))
    pieces: list[Tensor] = [torch.empty(0)] * count
    order = sorted(range(count), key=lambda i: len(texts.texts[i]))
    seen: dict[str, Tensor] = {}

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen["states"] = torch.cat(args[:2], -1)

    hook = backbone.encoder.layer[-1].attention.output.register_forward_pre_hook(note)
    with torch.inference_mode():
        for start in range(0, count, 50):
            part = order[start : start + 50]
            inputs = _cut(tokenise([texts.texts[i] for i in part]), tokens)
            backbone(**inputs)
            for i, state, mask in zip(part, seen["states"], inputs["attention_mask"]):
                pieces[i] = state[mask.bool()].clone()
    hook.remove()
    lengths = torch.tensor([0, *(len(piece) for piece in pieces)])
    return States(torch.cat(pieces), lengths.cumsum(0), texts.labels[:count])


def _cut(inputs: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
    return {name: tensor[:, :tokens] for name, tensor in inputs.items()}


def _check(backbone: Any, tokenise: Tokenise, texts: TextRows, states: States, tokens: int) -> None:
    rows, top = list(range(16)), Top(backbone)
    with torch.inference_mode():
        inputs = _cut(tokenise(texts.texts[:16]), tokens)
        whole = sentence_embedding(backbone(**inputs).last_hidden_state, inputs["attention_mask"])
        for ours in (embed(top, states.padded(rows)), states.embed_packed(top, rows)):
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
