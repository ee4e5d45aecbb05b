"""What a hybrid is compared with: components, as they came and tuned at equal cost, and the mean of their logits."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from mixwright.composition.eval_mode import eval_mode
from mixwright.evaluation.hybrid_documents import Documents, losses
from mixwright.evaluation.operations import counted
from mixwright.evaluation.verdict import EQUAL_FLOPS, EQUAL_TOKENS
from mixwright.methods.manticore.config import ManticoreConfig
from mixwright.methods.manticore.cost import cost
from mixwright.methods.manticore.model import HybridModel
from mixwright.methods.manticore.parameters import live_components, live_projectors
from mixwright.training.fit import fit
from mixwright.training.job import Job
from mixwright.training.stage import ParamGroup, Stage, select_parameters

AS_IT_CAME = "no tuning"
_PARTS = 10


def controls(
    job: Job, config: ManticoreConfig, pretrained: Sequence[nn.Module], spent: float, tokens: int
) -> Iterator[tuple[int, str, nn.Module]]:
    """Components to compare with, one after another: (number, budget, model). Each is the caller's to let go.

    `spent`: what the hybrid was trained for, in steps times FLOPs per token, counted over texts of `tokens` tokens.
    """
    for number, component in enumerate(pretrained):
        own = size_of(component, tokens).flops
        for budget, steps in budgets(config, spent, own).items():
            yield number, budget, component if steps == 0 else tuned(component, job, config, steps)


def budgets(config: ManticoreConfig, spent: float, own: float) -> dict[str, int]:
    """The steps that a component is trained for, by the name of the budget.

    Equal FLOPs: what the hybrid was trained for (`spent`) over what a step costs the component (`own`, per token). Both
    are counted in forwards; a backward costs about twice as much on either side, but less for a hybrid whose components
    are frozen, so that the component then has more than its share.
    """
    steps = config.tune_steps + config.discretise_steps
    tokens = {AS_IT_CAME: 0} if config.controls == "none" or not steps else {AS_IT_CAME: 0, EQUAL_TOKENS: steps}
    return {**tokens, EQUAL_FLOPS: round(spent / own)} if config.controls == "flops" and steps else tokens


@dataclass(frozen=True, kw_only=True)
class Size:
    """What a token costs. `parameters` that it meets; `flops` of what acts; `run_flops` of what is run in training,
    layers among them that stand before others of their component and act nowhere."""

    parameters: int
    flops: float
    run_flops: float


def size_of(model: nn.Module, tokens: int) -> Size:
    """Of a hybrid as it stands, or of a model alone; operations are counted over a text of so many tokens."""
    if isinstance(model, HybridModel):
        found = cost(model, tokens)
        return Size(parameters=acting_parameters(model), flops=found.pruned_flops, run_flops=found.flops_per_token)
    ids = torch.zeros(1, tokens, dtype=torch.long, device=next(model.parameters()).device)
    with eval_mode(model), counted({}) as seen:
        model(input_ids=ids)
    flops = (seen.products.total() + seen.elementwise.total()) / tokens
    return Size(parameters=acting_parameters(model), flops=flops, run_flops=flops)


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
