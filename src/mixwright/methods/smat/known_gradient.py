"""Gradients that are worked out before anybody asks for them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def promise(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    """A zero, and a list to put its gradients with respect to `tensors` in, before the backward pass; None is zero.

    The zero is added to the value whose gradients they are. It does not hold the tensors.
    """
    gradients: list[Tensor | None] = []
    return _Promised.apply(gradients, *tensors), gradients  # type: ignore[return-value]


class _Promised(Function):
    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor | None], *tensors: Tensor) -> Tensor:
        ctx.gradients, ctx.number = gradients, len(tensors)
        return tensors[0].new_zeros((), dtype=torch.promote_types(tensors[0].dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        found = list(ctx.gradients)
        if len(found) != ctx.number:
            raise RuntimeError(f"{ctx.number} gradients were promised, {len(found)} are there; they serve one pass.")
        ctx.gradients.clear()
        return None, *(None if each is None else each * grad.to(each.dtype) for each in found)
