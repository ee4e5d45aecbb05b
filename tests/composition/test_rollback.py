"""Weights that are changed in place and taken back to the bit."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mixwright.composition.rollback import Rollback
from mixwright.ops.digest import tensor_digest


class _Tied(nn.Module):
    """A tied pair, a transposed parameter, one with NaN and -0.0, and running statistics."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.slanted = nn.Parameter(torch.randn(5, 3).T)
        self.odd = nn.Parameter(torch.tensor([float("nan"), -0.0, float("inf")]))
        self.norm = nn.BatchNorm1d(4)
        self.to(dtype)


def _changed(model: nn.Module, seed: int = 0, edit: Callable[[Tensor], Tensor] = lambda t: t) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: edit(torch.randn(parameter.shape, generator=draw)).to(parameter.dtype)
        for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_thousand_switches_nested_and_not_leave_every_byte(dtype: torch.dtype) -> None:
    model = _Tied(dtype)
    assert not model.slanted.is_contiguous()
    rollback, before = Rollback(model), tensor_digest(model)
    rollback.seal()
    draw = torch.Generator().manual_seed(0)
    several = [_changed(model, seed) for seed in range(4)]
    for _ in range(1000):
        up = rollback.depth == 0 or (rollback.depth < 5 and bool(torch.rand((), generator=draw) < 0.5))
        rollback.apply(several[int(torch.randint(4, (), generator=draw))]) if up else rollback.undo()
    assert not rollback.is_pristine() or rollback.depth == 0
    while rollback.depth:
        rollback.undo()
    assert tensor_digest(model) == before and rollback.is_pristine()
    assert model.head.weight is model.embed.weight


def test_a_torn_change_is_taken_back_whole() -> None:
    model = _Tied(torch.float32)
    rollback, before = Rollback(model), tensor_digest(model)
    torn = _changed(model)
    torn["norm.bias"] = _Torn(torn["norm.bias"])
    with pytest.raises(KeyboardInterrupt):
        rollback.apply(torn)
    assert rollback.depth == 0 and tensor_digest(model) == before
    with pytest.raises(ValueError, match="no parameter"):
        rollback.apply({**_changed(model), "norm.bias": torch.zeros(5)})
    assert tensor_digest(model) == before


class _Torn(Tensor):
    """A tensor that cannot be copied from."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is Tensor.copy_:
            raise KeyboardInterrupt
        return super().__torch_function__(func, types, args, kwargs or {})


def test_what_was_done_in_inference_mode_is_undone_outside_and_trains_after() -> None:
    model = nn.Linear(3, 2)
    rollback, before = Rollback(model), tensor_digest(model)
    with torch.inference_mode():
        rollback.apply(_changed(model))
    weight = rollback.pristine()["weight"].clone().requires_grad_()
    (weight * rollback.pristine()["weight"]).sum().backward()
    with torch.inference_mode():
        rollback.undo()
    assert tensor_digest(model) == before
    with pytest.raises(ValueError, match="nothing to take back"):
        rollback.undo()


def test_a_bit_that_somebody_else_flips_is_seen() -> None:
    model = nn.Linear(3, 2)
    rollback = Rollback(model)
    assert rollback.is_pristine()
    with torch.no_grad():
        model.bias[0] = torch.nextafter(model.bias[0], torch.tensor(9.0))
    assert not rollback.is_pristine()
