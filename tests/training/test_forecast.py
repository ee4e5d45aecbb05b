"""A forecast times steps that learn nothing, and leaves the model as it was."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from mixwright.ops.digest import tensor_digest
from mixwright.training.forecast import STEPS, seconds_per_step
from mixwright.training.stage import ParamGroup, Stage


def test_twenty_steps_are_timed_and_nothing_is_learnt() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)).eval()
    model[0].weight.requires_grad_(False)
    seen: list[int] = []

    class Data:
        def batch(self, index: int) -> Any:
            seen.append(index)
            return SimpleNamespace(to=lambda device: torch.ones(2, 4, device=device))

    def objective(trained: Any, batch: Any) -> torch.Tensor:
        assert trained.training
        assert trained[0].weight.requires_grad
        assert not trained[1].weight.requires_grad
        return trained(batch).sum()

    stage = Stage(name="s", groups=(ParamGroup(select=("0.*",), lr=1.0),), steps=100, objective=objective)
    before = tensor_digest(model)
    assert seconds_per_step(model, stage, Data(), accumulate=2) > 0  # type: ignore[arg-type]
    assert tensor_digest(model) == before
    assert not model.training
    assert not model[0].weight.requires_grad
    assert model[1].weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert seen[1:] == list(range(2 * STEPS))
