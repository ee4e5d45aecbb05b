"""The rows of a model whose slots mix whole models: who has which weight where, and what it is like to force one.

Nothing in the model is changed: a forced row is another router in its slots, for as long as a block lasts.
"""

from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mixwright.backbones.eval_mode import eval_mode
from mixwright.composition.model import ComposedModel
from mixwright.experts.blocks import BlockExperts, EmbeddingExperts, HeadExperts
from mixwright.routers.base import AbstractRouter
from mixwright.routers.constant import ConstantRouter
from mixwright.routing import Condition, Routing

SLOTS = (EmbeddingExperts, BlockExperts, HeadExperts)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of mixture weights, in the order of the components. Several slots may follow the same row.

    `name`: of its first slot. `weights`: means over tokens where `spread`, their standard deviations, is not None.
    """

    name: str
    slots: tuple[str, ...]
    weights: tuple[float, ...]
    spread: tuple[float, ...] | None = None

    @property
    def leader(self) -> int:
        """The component with the largest weight; the earliest on a tie."""
        return max(range(len(self.weights)), key=lambda m: (self.weights[m], -m))


def mixes_models(model: ComposedModel) -> bool:
    """Whether the experts of every site are parts of whole models, each of which could stand alone."""
    return bool(model.mixtures) and all(isinstance(m.experts, SLOTS) for m in model.mixtures.values())


def slots_of_rows(model: ComposedModel) -> dict[str, tuple[str, ...]]:
    """Name of each row -> its slots, in the order of a pass; slots with one router have one row."""
    found: dict[int, list[str]] = {}
    for slot, mixture in model.mixtures.items():
        found.setdefault(id(mixture.router), []).append(slot)
    return {slots[0]: tuple(slots) for slots in found.values()}


def rows_of(model: ComposedModel, inputs: Mapping[str, Any]) -> list[Row]:
    """Every row as it is applied in a pass over `inputs`; padding is left out where weights differ by token."""
    with eval_mode(model), model.trace() as trace:
        model(**inputs)
    mask = inputs.get("attention_mask")
    return [_row(name, slots, trace[slots[0]][-1], mask) for name, slots in slots_of_rows(model).items()]


def _row(name: str, slots: tuple[str, ...], routing: Routing, mask: Tensor | None) -> Row:
    weights = routing.dense().detach().double().cpu()
    if weights[..., 0].numel() == 1:
        return Row(name=name, slots=slots, weights=tuple(weights.flatten().tolist()))
    if mask is not None and weights.dim() == 3 and weights.shape[:2] == mask.shape:
        weights = weights[mask.bool().cpu()]
    each = weights.reshape(-1, routing.num_experts)
    spread = tuple(each.std(0, correction=0).tolist())
    return Row(name=name, slots=slots, weights=tuple(each.mean(0).tolist()), spread=spread)


class ForcedWeight(AbstractRouter):
    """One component has the weight `value` whatever the row says; the others share the rest as they did among
    themselves, or evenly where they had nothing. A weight of 0 is exact: nobody runs for it."""

    def __init__(self, router: AbstractRouter, component: int, value: float) -> None:
        super().__init__()
        self.router, self.component, self.value = router, component, value
        self.num_experts = router.num_experts

    def forward(self, x: Float[Tensor, "*batch d_in"], condition: Condition) -> Routing:
        """The routing of the router beneath, with one weight in its place."""
        weights = self.router(x, condition).dense().clone()
        weights[..., self.component] = 0.0
        left = weights.sum(-1, keepdim=True)
        others = torch.ones_like(weights)
        others[..., self.component] = 0.0
        even = others / max(self.num_experts - 1, 1)
        weights = torch.where(left > 1e-12, weights / left.clamp_min(1e-12), even) * (1.0 - self.value)
        weights[..., self.component] = self.value
        return acting(weights, self.num_experts)


def acting(weights: Float[Tensor, "*decision models"], count: int) -> Routing:
    """The routing in which only components with a weight somewhere are named."""
    live = (weights != 0).reshape(-1, count).any(0).nonzero().flatten().cpu()
    if len(live) == count:
        return Routing(weights, count)
    chosen = weights.index_select(-1, live.to(weights.device))
    return Routing(chosen, count, live.expand(chosen.shape))


def forced(model: ComposedModel, row: str, component: int, value: float) -> AbstractContextManager[None]:
    """Inside the block one component has this weight in all slots of one row."""
    return _with_forced(model, slots_of_rows(model)[row], component, value)


def left_out(model: ComposedModel, component: int) -> AbstractContextManager[None]:
    """Inside the block one component has no weight anywhere."""
    return _with_forced(model, tuple(model.mixtures), component, 0.0)


@contextmanager
def fixed(model: ComposedModel, rows: Mapping[str, Float[Tensor, " models"]]) -> Generator[None]:
    """Inside the block the named rows have these weights."""
    slots = slots_of_rows(model)
    device = next(model.backbone.parameters()).device
    made = {row: ConstantRouter(weights).to(device) for row, weights in rows.items()}
    with model.replaced({slot: router for row, router in made.items() for slot in slots[row]}):
        yield


@contextmanager
def _with_forced(model: ComposedModel, slots: tuple[str, ...], component: int, value: float) -> Generator[None]:
    routers = {slot: model.mixtures[slot].router for slot in slots}
    made = {id(router): ForcedWeight(router, component, value) for router in routers.values()}  # one for each row
    with model.replaced({slot: made[id(router)] for slot, router in routers.items()}):
        yield
