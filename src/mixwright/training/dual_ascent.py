"""Lagrange multipliers of inequality constraints: up while a constraint is broken, back to zero once it is kept."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class DualAscent(torch.optim.Optimizer):
    """lambda <- max(0, lambda + lr v) where the violation v > 0; lambda <- 0 where v < 0 (Gallego-Posada et al. 2022).

    A parameter's gradient is its violation: the loss has a term lambda v, as (lambda - lambda.detach()) v where the
    other parameters are to feel a smooth proxy of it instead. No momentum, which would push on after a restart, and no
    weight decay. v = 0 leaves lambda as it is: so does a constraint that this step says nothing about.
    """

    def __init__(self, params: Iterable[dict[str, Any]]) -> None:
        super().__init__(params, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore  (torch's overloads)
        """One step for every multiplier that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    raised = (parameter + group["lr"] * parameter.grad).clamp_min_(0.0)
                    parameter.copy_(raised.masked_fill_(parameter.grad < 0, 0.0))
        return loss
