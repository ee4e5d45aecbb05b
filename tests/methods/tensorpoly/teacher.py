"""A model that knows four tasks, and shots of a fifth, labelled by its own experts under routing it has no row for.

So it is known which adaptation is right: a new row of logits explains the shots, and where the hidden routing is that
of a known task, that task's row does at once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import mixwright as mw
from mixwright.backbones.tiny import tiny_backbone
from mixwright.data.batches import Batches
from mixwright.data.collate import Batch
from mixwright.methods.tensorpoly.model import TaskComposedModel
from mixwright.methods.tensorpoly.task_rows import alone, task_routers
from mixwright.routing import Condition

TASKS = ("zero", "one", "two", "three")
HALVES = (0.5, 0.5, 0.0, 0.0)
"""Weights that no task has."""
TWO = (0.0, 0.0, 1.0, 0.0)
"""Those of task `two`."""
VOCAB = 24


def knowing(experts: str = "poly", *, share: str = "layer", **config: Any) -> TaskComposedModel:
    """A causal model whose task t listens to latent expert t, strongly; its experts do something."""
    backbone = tiny_backbone("llama", vocab_size=VOCAB, num_hidden_layers=1, intermediate_size=32)
    with torch.no_grad():
        backbone.lm_head.weight *= 8.0
    latent = None if experts in ("lora", "tlora") else 4
    settings = {"rank": 2, "num_latent": latent, "share": share, "target_modules": ("v_proj", "down_proj"), **config}
    model = mw.compose("tensorpoly", backbone=backbone, tasks=TASKS, experts=experts, **settings)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for mixture in model.mixtures.values():
            for parameter in mixture.experts.parameters():
                parameter.copy_(1.5 * torch.randn(parameter.shape, generator=draw) / parameter.shape[-1] ** 0.25)
        for router in task_routers(model):
            router.logits.copy_(sharp(router.logits.shape, range(len(TASKS))))
    return model


def sharp(shape: Sequence[int], experts: Sequence[int]) -> Tensor:
    """Logits under which row t listens to expert `experts[t]` alone, at every position."""
    logits = torch.full(tuple(shape), -6.0)
    for row, expert in enumerate(experts):
        logits[row, ..., expert] = 4.0
    return logits


def shots(model: TaskComposedModel, count: int, *, like: Sequence[float], seed: int = 0) -> Batches:
    """`count` rows of random tokens; the target of each token is what the model says under weights `like`."""
    ids = torch.randint(3, VOCAB, (count, 6), generator=torch.Generator().manual_seed(seed))
    weights = torch.tensor(like)
    logits = torch.log(weights / (1.02 - weights) + 1e-4)
    rows = {router: logits.expand(1, *router.logits.shape[1:]).clone() for router in task_routers(model)}
    model.eval()
    with torch.no_grad(), alone(model, rows), model.under(Condition(task_ids=torch.zeros(1, dtype=torch.long))):
        targets = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.argmax(-1)
    return Batches(list(zip(ids, targets, strict=True)), collate, batch_size=8, seed=seed)


def collate(rows: Sequence[tuple[Tensor, Tensor]]) -> Batch:
    ids, targets = (torch.stack(column) for column in zip(*rows, strict=True))
    return Batch("causal", {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, targets, targets.numel())


def loss(model: TaskComposedModel, data: Batches, task: str) -> float:
    """Per target, under a task."""
    from mixwright.training.objectives import supervised

    batch = collate(data.examples)
    model.eval()
    with torch.no_grad(), model.with_task(task):
        return float(supervised(model, batch)) / batch.weight


def everything(model: TaskComposedModel) -> dict[str, Tensor]:
    """Every tensor of the model, copied."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
