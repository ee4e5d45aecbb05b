"""How mixture weights are searched for by gradients: who learns when, on which data, with which draws."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixwright.data.collate import Batch
from mixwright.methods.manticore.config import ManticoreConfig
from mixwright.methods.manticore.cost import TOKENS, counting_length, flops_by_slot
from mixwright.methods.manticore.model import HybridModel
from mixwright.methods.manticore.parameters import WEIGHTS, live_components, live_projectors, present, slots
from mixwright.routers.mixture_weights import MixtureWeights
from mixwright.training.objectives import supervised
from mixwright.training.stage import Objective, ParamGroup

ENUMERATED = ("grid", "halving")
"""Searches that train one choice of weights after another."""
_DRAWS: Mapping[str, Literal["none", "gumbel", "dirichlet"]] = {"gumbel": "gumbel", "drnas": "dirichlet"}
_RATES = {"gaea": 0.1}
_ADAMW_RATE = 0.01


def component_groups(model: nn.Module, config: ManticoreConfig) -> tuple[ParamGroup, ...]:
    """What learns beside mixture weights: what acts of the components, where they learn, and their projectors."""
    assert isinstance(model, HybridModel)
    select = (*(live_components(model) if config.train_components else ()), *live_projectors(model))
    if not select:
        raise ValueError(
            "nothing is left to train: the components are frozen (config.train_components) and the mixture weights "
            "have no projector that acts. Let components learn, or leave this stage out."
        )
    name = "components and projectors" if config.train_components else "projectors"
    return (ParamGroup(select=select, lr=config.learning_rate, name=name),)


def search_groups(model: nn.Module, config: ManticoreConfig) -> tuple[ParamGroup, ...]:
    """Components and projectors; and the mixture weights, at a rate of their own, outside decay and clipping."""
    own = component_groups(model, config)
    if config.search in ENUMERATED:
        return own
    alternating = config.search == "alternating"
    weights = ParamGroup(
        select=present(model, WEIGHTS),
        lr=config.weights_learning_rate or _RATES.get(config.search, _ADAMW_RATE),
        name="mixture weights",
        optimizer="exponentiated_gradient" if config.search == "gaea" else "adamw",
        split="val" if config.search == "bilevel" else "train",
        weight_decay=0.0,
        clip=False,
        delay=config.weights_delay,
        turn=(1, 2) if alternating else None,
    )
    if not alternating:
        return (*own, weights)
    return (*(replace(group, turn=(0, 2)) for group in own), weights)


def begin_search(model: HybridModel, config: ManticoreConfig) -> None:
    """Mixture weights that are even over the components that may act, and drawn as this search draws them."""
    for row in rows(model):
        with torch.no_grad():
            row.logits.zero_()
            row.temperature.fill_(1.0)
        row.draw = _DRAWS.get(config.search, "none")
        row.anneal = None if config.temperature_end == 1.0 else (1.0, config.temperature_end)


def end_search(model: HybridModel) -> None:
    """Weights that are no longer drawn, and stay at the temperature that they ended with."""
    for row in rows(model):
        row.draw, row.anneal = "none", None


def rows(model: HybridModel) -> tuple[MixtureWeights, ...]:
    """Every row of mixture weights, the static part where they depend on the input; shared ones once."""
    return tuple(module for module in model.modules() if isinstance(module, MixtureWeights))


def watch_weights(model: nn.Module) -> Mapping[str, float]:
    """`weight.<slot>.<component>` for the log."""
    assert isinstance(model, HybridModel)
    found: dict[str, float] = {}
    for slot in slots(model):
        weights = model.row(slot).weights().tolist()
        found |= {f"weight.{slot}.{name}": value for name, value in zip(model.experts, weights, strict=True)}
    return found


def search_objective(config: ManticoreConfig, model: HybridModel, tokens: int = TOKENS) -> Objective:
    """The supervised loss, and what running the hybrid costs where the config weighs that in: operations of `model`'s
    components, counted here and once, over texts of so many tokens."""
    if not config.cost:
        return supervised
    return CostAware(config.cost, flops_by_slot(model, counting_length(model, tokens)).blocks())


@dataclass(frozen=True, eq=False)
class CostAware:
    """loss + lambda * targets * sum_k sum_m alpha_km F_km / sum_k sum_m F_km, F the operations of a run of layers.

    The loop divides by the targets, so that lambda is in nats per token. In eval mode the loss is the supervised one.
    """

    weight: float
    flops: Float[Tensor, "blocks models"]

    def __call__(self, model: HybridModel, batch: Batch) -> Tensor:
        """The loss summed over the batch's targets."""
        loss = supervised(model, batch)
        if not model.training:
            return loss
        with torch.autocast(loss.device.type, enabled=False):
            return loss + batch.weight * self.weight * asked_for(model, self.flops).to(loss.device)


def asked_for(model: HybridModel, flops: Float[Tensor, "blocks models"]) -> Float[Tensor, ""]:
    """The share of all blocks' operations that the mixture weights ask for, 0 to 1."""
    weights = torch.stack([model.row(slot).weights() for slot in slots(model)[1:-1]])
    return (weights * (flops / flops.sum()).to(weights)).sum()
