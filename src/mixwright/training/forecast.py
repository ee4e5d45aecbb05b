"""How long a stage will take: a few of its steps, timed with a learning rate of zero, so that nothing is learnt."""

from time import perf_counter
from typing import Any

import torch
from torch import nn

from mixwright.data.batches import Batches
from mixwright.training.stage import Stage, select_parameters

STEPS = 20


def seconds_per_step(model: nn.Module, stage: Stage, data: Batches, accumulate: int = 1, steps: int = STEPS) -> float:
    """Forward, backward and AdamW on the stage's own batches, in the mean of `steps`; the model is left as it was."""
    chosen = [p for group in select_parameters(model, stage.groups) for p in group.values()]
    wanted: dict[nn.Parameter, tuple[bool, Any]] = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)
        model.train()
        optimizer = torch.optim.AdamW(chosen, lr=0.0, weight_decay=0.0)
        _step(model, stage, data, optimizer, device, range(1))
        began = perf_counter()
        for step in range(steps):
            _step(model, stage, data, optimizer, device, range(step * accumulate, (step + 1) * accumulate))
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (perf_counter() - began) / steps
    finally:
        for parameter, (flag, gradient) in wanted.items():
            parameter.requires_grad_(flag)
            parameter.grad = gradient
        for module, training in modes:
            module.training = training


def _step(model: nn.Module, stage: Stage, data: Batches, optimizer: Any, device: torch.device, batches: range) -> None:
    optimizer.zero_grad()
    for index in batches:
        stage.objective(model, data.batch(index).to(device)).backward()
    optimizer.step()
