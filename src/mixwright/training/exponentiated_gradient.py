"""Exponentiated gradient for mixture weights: a step on the simplex itself, where a softmax would flatten its ends."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mixwright.routers.mixture_weights import MixtureWeights
from mixwright.routers.routed_weights import RoutedMixtureWeights

FLOOR = 1e-5


def plain_rows(model: nn.Module) -> dict[nn.Parameter, MixtureWeights]:
    """The mixture weights of a model that do not depend on the input, by their logits."""
    routed = {id(module.static) for module in model.modules() if isinstance(module, RoutedMixtureWeights)}
    found = (module for module in model.modules() if isinstance(module, MixtureWeights) and id(module) not in routed)
    return {module.logits: module for module in found}


class ExponentiatedGradient(torch.optim.Optimizer):
    """u = alpha * exp(-lr g), alpha <- max(u / sum u, 1e-5) / sum (GAEA, Li et al. 2021; Kivinen and Warmuth 1997).

    The parameters are logits a with alpha = softmax(a / tau), whose gradient is alpha (g - sum alpha g) / tau. Divided
    by alpha / tau it is the g of alpha but for a constant, which the sum takes out again. `rows` has the module of each
    parameter; components that it does not allow keep their logits. Nothing is kept between steps, and weight decay has
    no place here.
    """

    def __init__(self, params: Iterable[dict[str, Any]], rows: Mapping[nn.Parameter, MixtureWeights]) -> None:
        super().__init__(params, {"lr": 0.0})
        self.rows = dict(rows)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore  (torch's overloads)
        """One step for every row that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and group["lr"] != 0:
                    self._step(parameter, self.rows[parameter], group["lr"])
        return loss

    def _step(self, logits: nn.Parameter, row: MixtureWeights, rate: float) -> None:
        _, live = row.live()
        tau = row.temperature.double()
        before = (logits[live].double() / tau).log_softmax(-1)
        assert logits.grad is not None
        moved = exponentiated(before, tau * logits.grad[live].double() / before.exp(), rate)
        logits[live] = (tau * moved.log()).to(logits.dtype)


def exponentiated(log_weights: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """The weights after a step from exp(log_weights) along the gradient with respect to them."""
    moved = (log_weights - rate * (gradient - gradient.min())).softmax(-1).clamp_min(FLOOR)
    return moved / moved.sum(-1, keepdim=True)
