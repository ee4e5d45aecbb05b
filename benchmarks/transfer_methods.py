"""The methods of the transfer suite at two sizes, how they are trained together, and how they learn from shots."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mixwright as mw
from benchmarks.text_tasks import TEMPERATURE
from benchmarks.transfer_texts import Labels, States, StateTask, Top, together
from mixwright.evaluation.embedding import embed
from mixwright.routers.task import TaskLogits
from mixwright.routing import Condition, Routing

CONFIGS: dict[str, dict[str, Any]] = {
    "LoRA, private": {"experts": "poly"},
    "LoRA, shared": {"experts": "lora"},
    "Poly": {"experts": "poly", "num_latent": 8},
    "MHR": {"experts": "mhr", "num_latent": 8, "heads": 8},
    "TLoRA": {"experts": "tlora", "num_latent": 8},
    "TensorPoly-I": {"experts": "tensorpoly-1", "num_latent": 8},
    "TensorPoly-II": {"experts": "tensorpoly-2", "num_latent": 8},
    "entangled": {"experts": "entangled", "num_latent": 2, "groups": 4},
}
PRIVATE = "LoRA, private"
RANKS: dict[str, dict[str, int]] = {
    "small": {"LoRA, private": 1, "LoRA, shared": 8, "Poly": 1, "MHR": 1} | dict.fromkeys(list(CONFIGS)[4:], 14),
    "large": {"LoRA, private": 4, "LoRA, shared": 32, "Poly": 4, "MHR": 4} | dict.fromkeys(list(CONFIGS)[4:], 58),
}
"""At each size every method stores as nearly the same as whole ranks allow; private LoRAs can't be smaller."""
FRESH = "new task"
ROUTER_RATE = 0.1
"""The authors', in both stages."""
Z_RATE = 30.0
"""Where only the row learns, its rate is this many times the grid's: 0.03 to 1 about the authors' 0.1."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long everything is trained, for every method alike."""

    steps: int = 150
    rows: int = 16
    shot_steps: int = 24
    shot_rows: int = 8


def routed(method: str) -> bool:
    """Whether a method's tasks choose."""
    return method not in ("LoRA, private", "LoRA, shared", "TLoRA")


def ways(method: str) -> tuple[str, ...]:
    """What few-shot transfer may train."""
    return ("all", "z", "mu") if routed(method) else ("all",)


def compose(top: Top, method: str, size: str, names: list[str], seed: int) -> Any:
    """The method on the last layers, with a row for a new task after those of `names`."""
    config = CONFIGS[method] | {"rank": RANKS[size][method], "tasks": [*names, FRESH], "seed": seed}
    if method == PRIVATE:
        config["num_latent"] = len(names)
    model = mw.compose("tensorpoly", backbone=top, **config)
    if method == PRIVATE:
        for router in routers(model):
            one_hot = torch.eye(len(names) + 1, len(names)) * 60.0 - 30.0
            with torch.no_grad():
                router.logits.copy_(one_hot)
            router.logits.requires_grad_(False)
    return model


def single(top: Top, size: str, seed: int) -> Any:
    """A private LoRA for one new task."""
    return mw.compose("tensorpoly", backbone=top, experts="lora", rank=RANKS[size][PRIVATE], tasks=[FRESH], seed=seed)


def routers(model: Any) -> list[TaskLogits]:
    """The learned rows, each router once."""
    found = {id(m.router): m.router for m in model.mixtures.values() if isinstance(m.router, TaskLogits)}
    return list(found.values())


def leaves(model: Any) -> list[nn.Parameter]:
    """Everything that the experts learn."""
    return [p for mixture in model.mixtures.values() for p in mixture.experts.parameters()]


def stored(model: Any, method: str) -> int:
    """Numbers kept for the tasks it was trained on: experts and rows (those of private LoRAs say nothing)."""
    rows = 0 if method == PRIVATE else sum(r.logits[:-1].numel() for r in routers(model))
    return sum(p.numel() for p in leaves(model)) + rows


def fit(parameters: list[tuple[list[nn.Parameter], float]], loss: Callable[[int], Tensor], steps: int) -> list[float]:
    """AdamW without decay; the authors' schedule: linear warm-up over 6 %, linear fall to 0, gradients clipped at 1."""
    groups = [{"params": group, "lr": rate} for group, rate in parameters if group]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    warm = max(1, round(0.06 * steps))
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min((s + 1) / warm, (steps - s) / max(1, steps - warm))
    )
    every = [p for group in groups for p in group["params"]]
    history: list[float] = []
    for step in range(steps):
        optimiser.zero_grad()
        value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(every, 1.0)
        optimiser.step()
        rates.step()
        history.append(float(value.detach()))
    return history


def train_together(model: Any, tasks: list[StateTask], rate: float, effort: Effort, seed: int) -> list[float]:
    """Stage multitask: every row of a batch is of a task drawn evenly, for all methods the same rows."""
    data, labels = together([task.train for task in tasks]), Labels(tasks)
    sizes = torch.tensor([len(task.train) for task in tasks])
    first = sizes.cumsum(0) - sizes

    def loss(step: int) -> Tensor:
        draw = torch.Generator().manual_seed(1_000_003 * seed + step)
        ids = torch.randint(len(tasks), (effort.rows,), generator=draw)
        rows = first[ids] + (torch.rand(effort.rows, generator=draw) * sizes[ids]).long()
        with model.under(Condition(task_ids=ids)):
            embedded = embed(model, data.padded(rows.tolist()))
        return labels.loss(embedded, data.labels[rows], ids)

    rows = [router.logits for router in routers(model) if router.logits.requires_grad]
    return fit([(leaves(model), rate), (rows, ROUTER_RATE)], loss, effort.steps)


def accuracy(model: Any, states: States, anchors: Tensor, way: AbstractContextManager[Any] | None = None) -> list[int]:
    """Whether each row of `states` is right, in its order: 1 or 0."""
    right = torch.zeros(len(states), dtype=torch.long)
    with torch.no_grad(), way or nullcontext():
        for rows in states.batches(25):
            found = (states.embed_packed(model, rows) @ anchors.T).argmax(-1)
            right[rows] = (found == states.labels[rows]).long()
    return right.tolist()


def of_task(model: Any, task: int) -> AbstractContextManager[Any]:
    """Inside the block every row is of this task."""
    return model.under(Condition(task_ids=torch.tensor([task])))


def uniform(model: Any) -> AbstractContextManager[Any]:
    """Inside the block every latent expert has the same weight (MHR's mu)."""
    count = len(model.experts)
    return model.routed_by(Routing(torch.full((count,), 1.0 / count), count))


def route(model: Any, method: str, what: str, row: int) -> AbstractContextManager[Any]:
    """How the new task is routed under this way of transfer."""
    if not routed(method):
        return nullcontext()
    return uniform(model) if what == "mu" else of_task(model, row)


def learn(
    model: Any, way: AbstractContextManager[Any], what: str, shots: States, anchors: Tensor, rate: float,
    effort: Effort, seed: int,
) -> None:  # fmt: skip
    """Stage transfer: all, the task's row (z), or the experts under uniform routing (mu); every epoch a fresh order."""
    rows = [router.logits for router in routers(model)]
    if what == "z":
        groups = [(rows, Z_RATE * rate)]
    elif what == "mu" or not rows:
        groups = [(leaves(model), rate)]
    else:
        groups = [(leaves(model), rate), (rows, ROUTER_RATE)]
    for parameter in leaves(model):
        parameter.requires_grad_(what != "z")
    order: list[int] = []

    def loss(step: int) -> Tensor:
        nonlocal order
        if len(order) < effort.shot_rows:
            draw = torch.Generator().manual_seed(1_000_003 * seed + step)
            order = order + torch.randperm(len(shots), generator=draw).tolist()
        chosen, order = order[: effort.shot_rows], order[effort.shot_rows :]
        logits = shots.embed_packed(model, chosen) @ anchors.T / TEMPERATURE
        return cross_entropy(logits, shots.labels[chosen])

    with way:
        fit(groups, loss, effort.shot_steps)
    for parameter in leaves(model):
        parameter.requires_grad_(True)


def draw_shots(task: StateTask, shots: int, seed: int) -> States:
    """So many rows of each class; a larger number holds the smaller one's rows."""
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen: list[int] = []
    for label in range(len(task.anchors)):
        chosen += [i for i in order if task.train.labels[i] == label][:shots]
    starts = task.train.starts
    pieces = [task.train.flat[starts[i] : starts[i + 1]] for i in chosen]
    lengths = torch.tensor([0, *(len(piece) for piece in pieces)])
    return States(torch.cat(pieces), lengths.cumsum(0), task.train.labels[chosen])
