"""Timing runs on every kind of backbone and leaves the model as it was."""

import pytest
import torch

from mixwright.evaluation.step_time import step_times

from .task_model import task_model


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_times_are_positive_and_the_model_is_untouched(family: str) -> None:
    model = task_model("ordered", family=family)
    model.backbone.eval()
    frozen = next(iter(model.mixtures.values())).router
    frozen.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    times = step_times(model, 3, rows=2, tokens=5)
    assert min(times.evaluate, times.backbone, times.train) > 0
    assert (times.rows, times.tokens, times.device) == (2, 5, "cpu")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_a_backbone_that_reads_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="reads no tokens"):
        step_times(task_model("poly", family="vit"), 3)
