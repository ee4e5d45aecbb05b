"""What stage *multitask* minimises: the supervised loss, and the terms against collapse that the config weighs in."""

from dataclasses import dataclass
from math import log
from typing import cast

import torch
from torch import Tensor

from mixwright.composition.model import ComposedModel
from mixwright.data.collate import Batch
from mixwright.experts.base import AbstractExperts
from mixwright.experts.poly import PolyExperts
from mixwright.experts.tensor import OrderedTensorExperts, TensorExperts
from mixwright.methods.tensorpoly.config import TensorPolyConfig
from mixwright.methods.tensorpoly.task_rows import task_routers
from mixwright.ops import collapse
from mixwright.training.objectives import supervised
from mixwright.training.stage import Objective


def objective(config: TensorPolyConfig) -> Objective:
    """The supervised loss alone unless a weight is set."""
    weights = (config.mutual_information, config.orthogonality, config.sparsity, config.ibp)
    return Regularised(*weights) if any(weights) else supervised


@dataclass(frozen=True)
class Regularised:
    """loss + targets * (orthogonality overlap + sparsity surplus + ibp prior - mutual_information information).

    The loop divides by the number of targets in a step, so a weight means the same for every batch. Each term is a mean
    over routers or sites and free of their sizes: `information` is I(task; expert) / log R, 0 to 1; `overlap` the mean
    square cosine of two latent experts, 0 to 1; `surplus` the share of gates open beyond one for each task; `prior`
    - log P(Z) of the Indian buffet process for each entry of Z. In eval mode, in which held-out data are scored, the
    loss is the supervised one.
    """

    mutual_information: float
    orthogonality: float
    sparsity: float
    ibp: float

    def __call__(self, model: ComposedModel, batch: Batch) -> Tensor:
        """The loss summed over the batch's targets."""
        loss = supervised(model, batch)
        if not model.training:
            return loss
        with torch.autocast(loss.device.type, enabled=False):
            return loss + batch.weight * self.penalty(model).to(loss.device)

    def penalty(self, model: ComposedModel) -> Tensor:
        """The terms of a model as it stands."""
        total = torch.zeros(())
        if self.mutual_information:
            total = total - self.mutual_information * information(model)
        if self.orthogonality:
            total = total + self.orthogonality * overlap(model)
        if self.sparsity:
            total = total + self.sparsity * surplus(model)
        if self.ibp:
            total = total + self.ibp * prior(model)
        return total


def information(model: ComposedModel) -> Tensor:
    """I(task; expert) / log R, the mean over routers and their positions; 0 where there is nothing to choose."""
    routers = [router for router in task_routers(model) if router.num_experts > 1]
    terms = [collapse.mutual_information(router.table()).mean() / log(router.num_experts) for router in routers]
    return _mean(terms)


def surplus(model: ComposedModel) -> Tensor:
    """relu(mean sigmoid(Z) - 1 / R), the mean over routers."""
    return _mean([collapse.surplus(router.logits) for router in task_routers(model) if router.num_experts > 1])


def prior(model: ComposedModel) -> Tensor:
    """- log P(round(sigmoid(Z))) / (tasks * experts), the mean over routers and their positions."""
    terms: list[Tensor] = []
    for router in task_routers(model):
        logits = router.logits[:, None] if router.logits.dim() == 2 else router.logits
        terms += [collapse.indian_buffet(own) / own.numel() for own in logits.unbind(1)]
    return _mean(terms)


def overlap(model: ComposedModel) -> Tensor:
    """The overlap of latent experts, the mean over A and B of every site."""
    return _mean([_overlap(mixture.experts) for mixture in model.mixtures.values()])


def _overlap(experts: AbstractExperts) -> Tensor:
    """Of tensors that are routed as wholes, by the leaves of all orders together; of leaves that are routed order by
    order, order by order; of matrices in heads, head by head."""
    if isinstance(experts, TensorExperts):
        return (collapse.overlap(tuple(experts.down)) + collapse.overlap(tuple(experts.up))) / 2
    if isinstance(experts, OrderedTensorExperts):
        return _mean([collapse.overlap([leaf]) for leaf in (*experts.down, *experts.up)])
    stored = cast(PolyExperts, experts)
    sides = (side.unflatten(2, (stored.heads, -1)) for side in (stored.down, stored.up))
    return _mean([collapse.overlap([side]) for side in sides])


def _mean(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).mean() if terms else torch.zeros(())
