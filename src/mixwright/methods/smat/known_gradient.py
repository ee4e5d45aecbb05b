"""A value whose gradient was worked out before anybody asks for it."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd import Function


def with_gradients(value: Tensor, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    """`value`, a scalar whose gradients with respect to `tensors` are `gradients`; None is zero."""
    return _Known.apply(value, gradients, *tensors)  # type: ignore[no-any-return]


class _Known(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor | None], *tensors: Tensor) -> Tensor:
        del tensors
        ctx.gradients = gradients
        return value.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        found, ctx.gradients = ctx.gradients, None
        if found is None:
            raise RuntimeError("the gradients of this value were taken already; they are kept for one backward pass.")
        scaled = (None if each is None else each * grad.to(each.dtype) for each in found)
        return None, None, *scaled
