"""What a hybrid is compared with: components, as they came and tuned at equal cost, and the mean of their logits."""

import copy
from collections.abc import Iterator, Sequence
from itertools import combinations_with_replacement
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from mixwright.evaluation.hybrid_documents import Documents, losses
from mixwright.evaluation.verdict import EQUAL_FLOPS, EQUAL_TOKENS
from mixwright.methods.manticore.config import ManticoreConfig
from mixwright.methods.manticore.model import HybridModel
from mixwright.methods.manticore.parameters import live_components, live_projectors
from mixwright.training.fit import fit
from mixwright.training.job import Job
from mixwright.training.stage import ParamGroup, Stage, select_parameters

AS_IT_CAME = "no tuning"
_PARTS = 10


def controls(
    job: Job, config: ManticoreConfig, pretrained: Sequence[nn.Module]
) -> Iterator[tuple[int, str, nn.Module]]:
    """Components to compare with, one after another: (number, budget, model). Each is the caller's to let go."""
    for number, component in enumerate(pretrained):
        for budget, steps in budgets(config, pretrained, number).items():
            yield number, budget, component if steps == 0 else tuned(component, job, config, steps)


def budgets(config: ManticoreConfig, pretrained: Sequence[nn.Module], number: int) -> dict[str, int]:
    """The steps that a component is trained for, by the name of the budget.

    Equal FLOPs: the hybrid's steps times what one costs it, over what one costs the component; parameters that act
    stand for FLOPs.
    """
    own, whole = acting_parameters(pretrained[number]), sum(acting_parameters(one) for one in pretrained)
    steps = config.tune_steps + config.discretise_steps
    tokens = {AS_IT_CAME: 0} if config.controls == "none" or not steps else {AS_IT_CAME: 0, EQUAL_TOKENS: steps}
    return {**tokens, EQUAL_FLOPS: round(steps * whole / own)} if config.controls == "flops" and steps else tokens


def tuned(component: nn.Module, job: Job, config: ManticoreConfig, steps: int) -> nn.Module:
    """A copy of a component, trained as the hybrid is in stage *tune*."""
    assert job.data is not None
    stage = Stage(
        name="control",
        groups=(ParamGroup(select=("*",), lr=config.learning_rate),),
        steps=steps,
        warmup=config.warmup,
        cooldown=config.cooldown,
        weight_decay=config.weight_decay,
        choose_every=config.choose_every,
    )
    model = copy.deepcopy(component)
    fit(model, stage, job.data, config=job.recipe.train, seed=job.recipe.seed, validation=job.validation)
    return model


class PlainEnsemble(nn.Module):
    """logits = sum_m w_m logits_m of models that stand alone; called as one of them is."""

    def __init__(self, models: Sequence[nn.Module], weights: Sequence[float], vocab_size: int) -> None:
        super().__init__()
        self.models, self.weights, self.vocab_size = nn.ModuleList(models), tuple(weights), vocab_size

    def forward(self, *args: Any, condition: object = None, **kwargs: Any) -> Any:
        """An output with the mean `logits`, of the columns that all have."""
        del condition
        mixed = sum(
            weight * model(*args, **kwargs).logits[..., : self.vocab_size].float()
            for weight, model in zip(self.weights, self.models, strict=True)
            if weight
        )
        return SimpleNamespace(logits=mixed)


def best_ensemble(models: Sequence[nn.Module], documents: Documents, vocab_size: int) -> tuple[float, ...]:
    """The weights, multiples of a tenth, whose mean logits have the least loss on these documents."""
    points = list(simplex(_PARTS, len(models)))
    found = [float(losses(PlainEnsemble(models, point, vocab_size), documents).sum()) for point in points]
    return points[found.index(min(found))]


def simplex(parts: int, models: int) -> Iterator[tuple[float, ...]]:
    """Every row of weights that are multiples of 1 / parts, the first one's rising."""
    for cuts in combinations_with_replacement(range(parts + 1), models - 1):
        ends = (0, *cuts, parts)
        yield tuple((b - a) / parts for a, b in zip(ends, ends[1:]))


def acting_parameters(model: nn.Module) -> int:
    """Parameters that a token meets: all but an embedding that is looked up only; of a hybrid, of what acts in it."""
    if isinstance(model, HybridModel):
        names = (*live_components(model), *live_projectors(model))
        chosen = select_parameters(model, [ParamGroup(select=names, lr=1.0)])[0]
        looked_up = sum(_looked_up(part) for part, acts in zip(model.components, _acting(model)) if acts)
        return sum(p.numel() for p in chosen.values()) - looked_up
    return sum(p.numel() for p in model.parameters()) - _looked_up(model)


def _acting(model: HybridModel) -> list[bool]:
    return (model.embedding_weights.cpu() > 0).tolist()


def _looked_up(component: nn.Module) -> int:
    """Numbers of an embedding that is not the head's as well."""
    table: torch.Tensor = component.get_input_embeddings().weight  # type: ignore[operator,union-attr]
    head: torch.Tensor = component.get_output_embeddings().weight  # type: ignore[operator,union-attr]
    return 0 if table is head else table.numel()
