"""What is watched while tasks train together: numbers that show collapse, and in words what to do about it."""

from collections.abc import Mapping

import torch
from torch import nn

from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel
from mixwright.evaluation.task_alarms import CANCELLING, DEAD, ONE_SIDED, SAME
from mixwright.evaluation.task_routing import gates_of, products_of, shape_of, weights_of
from mixwright.experts.factored import AbstractFactored
from mixwright.methods.tensorpoly.task_rows import task_routers
from mixwright.routers.task import TaskLogits

PATIENCE = 20
"""Looks in a row after which routing that is still uniform is no longer merely young."""
EVERY = 5
"""Looks from one to the next at which the experts' parts are taken."""


class Watch:
    """Looks at a model in training: numbers for the log, and which of them are bad news.

    Means over routers, and over sites, where nothing else is said. With S experts: `routing.peakiness` 1 - entropy of a
    task's row / log S; `routing.usage` entropy of the mean row / log S; `routing.separation` their information about
    the task, usage - 1 + peakiness; `routing.discreteness` binary entropy of sigmoid(z) / log 2, 0 where it is on or
    off; `routing.sparsity` share of sigmoid(z) over 0.5 (Poly's numbers). At every fifth look, since that costs more:
    `experts.dead` share of experts that add next to nothing to any task's update; `experts.cancelling` squared parts of
    an update over the squared update, at the worst site. See `AbstractFactored.contribution` for the parts.
    """

    def __init__(self, patience: int = PATIENCE) -> None:
        self.patience = patience
        self._looks = self._uniform = 0
        self._known: dict[str, float] = {}

    @torch.no_grad()
    def look(self, model: nn.Module) -> dict[str, float]:
        """The numbers of this moment."""
        assert isinstance(model, ComposedModel)
        rows = [_routing(router) for router in task_routers(model) if router.num_experts > 1]
        numbers = {f"routing.{name}": _mean([row[name] for row in rows]) for name in (rows[0] if rows else ())}
        if self._looks % EVERY == 0:
            parts = [found for mixture in model.mixtures.values() if (found := _parts(mixture)) is not None]
            if parts:
                numbers["experts.dead"] = _mean([dead for dead, _ in parts])
                numbers["experts.cancelling"] = max(cancelling for _, cancelling in parts)
        self._looks += 1
        return numbers

    def alarms(self, numbers: Mapping[str, float]) -> dict[str, str]:
        """Name of each alarm -> what it means and what may help. What was not looked at is as it was last time.

        Routing that is uniform is no alarm before it has been so for `patience` looks: it starts like that.
        """
        self._known.update(numbers)
        known = {"routing.separation": 1.0, "routing.usage": 1.0, "experts.dead": 0.0, "experts.cancelling": 1.0}
        separation, usage, dead, cancelling = ({**known, **self._known}[name] for name in known)
        self._uniform = self._uniform + 1 if separation < SAME and usage >= ONE_SIDED else 0
        found: dict[str, str] = {}
        if self._uniform >= self.patience:
            found["uniform routing"] = (
                f"tasks share one mixture of experts (separation {separation:.3f} of 1), as if nothing was routed; "
                "raise router_learning_rate, or set mutual_information to 0.01 or more"
            )
        if usage < ONE_SIDED:
            found["one-sided routing"] = (
                f"all tasks lean on the same few experts (usage {usage:.2f} of 1); lower router_learning_rate, or set "
                "mutual_information"
            )
        if dead > 0:
            found["dead experts"] = (
                f"{dead:.1%} of the latent experts add nothing to any task's update; use fewer (num_latent), or set "
                "mutual_information"
            )
        if cancelling > CANCELLING:
            found["cancelling experts"] = (
                f"at one site the experts' parts are {cancelling:.0f} times the update that is left of them, so they "
                "mostly undo each other; lower learning_rate, or set orthogonality"
            )
        return found


def _routing(router: TaskLogits) -> dict[str, float]:
    numbers = {**shape_of(weights_of(router, router.num_tasks)), **gates_of(router)}
    return {name: value for name, value in numbers.items() if value is not None}


def _parts(mixture: Mixture) -> tuple[float, float] | None:
    """Share of dead experts and cancelling at one site; None where there is one expert, or no update yet."""
    experts, router = mixture.experts, mixture.router
    if not isinstance(experts, AbstractFactored) or experts.num_experts < 2:
        return None
    products = products_of(experts, weights_of(router, 1))
    total = products.sum((-2, -1)).clamp_min(0)
    changed = total > 0
    if not changed.any():
        return None
    share = (products.sum(-1)[changed] / total[changed][..., None]).abs().amax(0)
    squares = products.diagonal(dim1=-2, dim2=-1).sum(-1)[changed] / total[changed]
    return float((share < DEAD / experts.num_experts).double().mean()), float(squares.mean())


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
