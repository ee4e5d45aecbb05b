"""The ground around a choice of mixture weights: the loss along one row, over two rows, and how sharply it bends."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mixwright.backbones.eval_mode import eval_mode
from mixwright.composition.model import ComposedModel
from mixwright.data.collate import IGNORED, Batch
from mixwright.evaluation.hybrid_counterfactuals import Meter
from mixwright.evaluation.hybrid_documents import Documents
from mixwright.evaluation.hybrid_rows import Row, forced, slots_of_rows

POINTS = 11
_STEP = 0.05
_NUDGE = 1e-2


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The loss while one weight of one row goes from 0 to 1, everything else as it is.

    `chosen`: the weight that the model has, with `chosen_loss`; `best`: the grid's best weight. `curvature`: second
    difference of the loss at `curved_at`, in nats per squared weight: near 0 the choice hardly matters there.
    """

    row: str
    component: str
    weights: list[float]
    losses: list[float]
    chosen: float
    chosen_loss: float
    curvature: float
    curved_at: float

    @property
    def best(self) -> int:
        """Where on the grid the loss is least."""
        return min(range(len(self.losses)), key=self.losses.__getitem__)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The loss over the weights of one component in two rows: `losses[i][j]` at `weights[i]` of the first row."""

    component: str
    rows: tuple[str, str]
    weights: list[float]
    losses: list[list[float]]
    chosen: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Flatness:
    """Eigenvalues of the Hessian of the loss over all mixture logits that are free to move, largest first.

    From central differences of the gradient, in the directions in which weights change at all: adding the same to
    every logit of a row does not. `rows`: the rows that have such a direction. `tokens`: how many it was measured on.
    """

    eigenvalues: list[float]
    gradient: float
    rows: list[str]
    tokens: int


def sweep(meter: Meter, row: Row, component: int, points: int = POINTS) -> Sweep:
    """Measure the loss at `points` weights of one component of one row, the others sharing the rest."""
    weights = [place / (points - 1) for place in range(points)]
    centre = min(max(row.weights[component], _STEP), 1.0 - _STEP)
    left, middle, right = (
        meter.loss(meter.forced(row.name, component, value)) for value in (centre - _STEP, centre, centre + _STEP)
    )
    return Sweep(
        row=row.name,
        component=meter.model.experts[component],
        weights=weights,
        losses=[meter.loss(meter.forced(row.name, component, value)) for value in weights],
        chosen=row.weights[component],
        chosen_loss=meter.loss(meter.hybrid()),
        curvature=(left - 2 * middle + right) / _STEP**2,
        curved_at=centre,
    )


def grid(meter: Meter, rows: tuple[Row, Row], component: int, points: int = 6) -> Grid:
    """The loss at `points` x `points` weights of one component in two rows."""
    weights = [place / (points - 1) for place in range(points)]
    first, second = rows

    def loss(one: float, other: float) -> float:
        with ExitStack() as stack:
            stack.enter_context(forced(meter.model, first.name, component, one))
            stack.enter_context(forced(meter.model, second.name, component, other))
            key = ("weights", first.name, second.name, component, round(one, 6), round(other, 6))
            return meter.loss(meter.sums(key))

    return Grid(
        component=meter.model.experts[component],
        rows=(first.name, second.name),
        weights=weights,
        losses=[[loss(one, other) for other in weights] for one in weights],
        chosen=(first.weights[component], second.weights[component]),
    )


def flatness(model: ComposedModel, documents: Documents, batches: int = 4) -> Flatness | None:
    """The Hessian over the mixture logits on the first `batches` batches; None where no row has two live components."""
    part = documents.batches[:batches]
    slots = slots_of_rows(model)
    free = {
        row: found for row, (slot, *_) in slots.items() if (found := _free(model.mixtures[slot].router)) is not None
    }
    if not free:
        return None
    logits = [logits for logits, _ in free.values()]
    directions = _directions(list(free.values()))
    asked = [parameter.requires_grad for parameter in logits]
    before = [parameter.detach().clone() for parameter in logits]
    try:
        for parameter in logits:
            parameter.requires_grad_(True)
        columns: list[Tensor] = []
        for direction in directions:
            ahead, behind = (_gradient(model, part, logits, before, direction, sign * _NUDGE) for sign in (1.0, -1.0))
            columns.append((ahead - behind) / (2 * _NUDGE))
        here = _gradient(model, part, logits, before, directions[0], 0.0)
    finally:
        for parameter, value, flag in zip(logits, before, asked, strict=True):
            _put(parameter, value)
            parameter.requires_grad_(flag)
    basis = torch.stack(directions)
    hessian = basis @ torch.stack(columns, -1)
    values = torch.linalg.eigvalsh((hessian + hessian.T) / 2).flip(0)
    tokens = sum(int((batch.targets != IGNORED).sum()) for batch in part)
    return Flatness(eigenvalues=values.tolist(), gradient=float((basis @ here).norm()), rows=list(free), tokens=tokens)


def _free(router: nn.Module) -> tuple[nn.Parameter, Tensor] | None:
    """A row's logits and which of them are live; None where fewer than two are, or it has none."""
    row = getattr(router, "static", router)  # of a router that adds something for each token, what it adds to
    logits, allowed = getattr(row, "logits", None), getattr(row, "allowed", None)
    if not isinstance(logits, nn.Parameter) or logits.dim() != 1:
        return None
    live = torch.ones_like(logits, dtype=torch.bool) if allowed is None else allowed
    return (logits, live) if int(live.sum()) > 1 else None


def _directions(rows: Sequence[tuple[nn.Parameter, Tensor]]) -> list[Float[Tensor, " numbers"]]:
    """Orthonormal directions in all logits laid end to end, each within one row's live components, summing to 0."""
    total = sum(len(logits) for logits, _ in rows)
    found: list[Tensor] = []
    start = 0
    for logits, live in rows:
        places = live.nonzero().flatten().cpu() + start
        for count in range(1, len(places)):  # Helmert's contrasts: the mean of the first ones against the next
            direction = torch.zeros(total, dtype=torch.float64)
            direction[places[:count]] = 1.0
            direction[places[count]] = -float(count)
            found.append(direction / direction.norm())
        start += len(logits)
    return found


@torch.no_grad()
def _put(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.copy_(value)


def _gradient(
    model: ComposedModel,
    batches: Sequence[Batch],
    logits: Sequence[nn.Parameter],
    before: Sequence[Tensor],
    direction: Tensor,
    step: float,
) -> Float[Tensor, " numbers"]:
    """Of the loss per token, with the logits moved along a direction; float64."""
    start = 0
    for parameter, value in zip(logits, before, strict=True):
        moved = step * direction[start : start + len(value)]
        _put(parameter, value + moved.to(value))
        start += len(value)
    total, tokens = [torch.zeros(len(value), dtype=torch.float64) for value in before], 0
    with eval_mode(model), torch.enable_grad():
        for batch in batches:
            placed = batch.to(logits[0].device)
            out = model(**placed.inputs, use_cache=False).logits.float()
            loss = cross_entropy(out.transpose(1, 2), placed.targets, ignore_index=IGNORED, reduction="sum")
            parts = torch.autograd.grad(loss, list(logits))
            total = [s + g.double().cpu() for s, g in zip(total, parts, strict=True)]
            tokens += int((placed.targets != IGNORED).sum())
    return torch.cat(total) / tokens
