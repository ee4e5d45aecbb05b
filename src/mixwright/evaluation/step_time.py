"""How long one step of a model takes here and now: measured on random tokens, only when somebody asks."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from mixwright.backbones.eval_mode import eval_mode
from mixwright.composition.model import ComposedModel
from mixwright.routing import Condition

_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Milliseconds of wall time, the median of five rounds after one that does not count.

    `train`: forward, backward and AdamW on all that was added, rows of the batch from tasks in turn. `evaluate`: a
    forward of the same batch; `backbone`: the same without what was added. `rows` by `tokens` random tokens.
    """

    train: float
    evaluate: float
    backbone: float
    rows: int
    tokens: int
    threads: int
    device: str


def step_times(model: ComposedModel, tasks: int, *, rows: int = 8, tokens: int = 64) -> StepTimes:
    """Time a model on this machine. It is left as it was: steps have a learning rate of zero.

    Raises ValueError for a backbone that reads no tokens.
    """
    if getattr(model.backbone, "main_input_name", "input_ids") != "input_ids":
        raise ValueError("this backbone reads no tokens, so it can't be timed with random ones; leave out --measure.")
    device = next(model.backbone.parameters()).device
    inputs = _inputs(model, rows, tokens, device)
    condition = Condition(task_ids=torch.arange(rows, device=device) % tasks)

    def forward() -> Tensor:
        return model(condition=condition, **inputs)[0].float()

    def loss() -> Tensor:
        found = forward()
        if found.shape[:2] != (rows, tokens) or not _predicts(model):
            return found.square().mean()
        return nn.functional.cross_entropy(found.flatten(0, 1), next(reversed(inputs.values())).flatten())

    train = _trained(model, loss, device)
    with eval_mode(model):
        evaluate = _milliseconds(forward, device)
        with model.disabled():
            backbone = _milliseconds(forward, device)
    return StepTimes(
        train=train,
        evaluate=evaluate,
        backbone=backbone,
        rows=rows,
        tokens=tokens,
        threads=torch.get_num_threads(),
        device=str(device),
    )


def _inputs(model: ComposedModel, rows: int, tokens: int, device: torch.device) -> dict[str, Tensor]:
    config: Any = model.backbone.config
    draw = torch.Generator().manual_seed(0)
    top = int(config.get_text_config().vocab_size)
    names = ["input_ids", *(["decoder_input_ids"] if getattr(config, "is_encoder_decoder", False) else [])]
    return {name: torch.randint(min(4, top - 1), top, (rows, tokens), generator=draw).to(device) for name in names}


def _predicts(model: ComposedModel) -> bool:
    can_generate = getattr(model.backbone, "can_generate", None)
    return bool(can_generate and can_generate())


def _trained(model: ComposedModel, loss: Callable[[], Tensor], device: torch.device) -> float:
    added = [p for m in model.mixtures.values() for part in (m.router, m.experts) for p in part.parameters()]
    asked = [(parameter, parameter.requires_grad, parameter.grad) for parameter in dict.fromkeys(added)]
    modes = [(module, module.training) for module in model.modules()]
    for parameter, _, _ in asked:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW([parameter for parameter, _, _ in asked], lr=0.0, weight_decay=0.0)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    try:
        model.train()
        return _milliseconds(step, device)
    finally:
        for parameter, wanted, gradient in asked:
            parameter.grad = gradient
            parameter.requires_grad_(wanted)
        for module, training in modes:
            module.training = training


def _milliseconds(call: Callable[[], object], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: list[float] = []
    for _ in range(_ROUNDS + 1):
        start = perf_counter()
        call()
        wait()
        times.append(1000 * (perf_counter() - start))
    return median(times[1:])
