"""What a trace says: who carries the load, how sure the router is, and how much each expert really adds.

The weights counted are those that were applied, after the choice of k; padding is left out where a mask is given.
Weights alone mislead, since experts differ in size: `contributions` measures what is added against what the backbone
gives.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mixwright.backbones.eval_mode import eval_mode
from mixwright.composition.model import ComposedModel
from mixwright.data.collate import Batch
from mixwright.evaluation.evaluate import evaluate
from mixwright.evaluation.scores import AbstractTask
from mixwright.evaluation.systems import composed
from mixwright.experts.lora import LoraExperts
from mixwright.routing import Routing

Trace = Mapping[str, Sequence[Routing]]


@dataclass(frozen=True)
class SiteStats:
    """One site, means over its tokens.

    `load` (experts,): share of the total weight. `entropy` of the weights, in nats. `margin`: the largest weight minus
    the second. `tokens`: decisions behind the means.
    """

    load: Float[Tensor, " experts"]
    entropy: float
    margin: float
    tokens: int


def site_stats(routings: Sequence[Routing], mask: Bool[Tensor, "batch seq"] | None = None) -> SiteStats:
    """Statistics of the passes of one site; `mask` keeps the decisions of real tokens, where shapes agree."""
    rows = torch.cat([_decisions(routing, mask) for routing in routings])
    best = rows.topk(min(2, rows.shape[-1]), dim=-1).values
    margin = best[:, 0] - best[:, 1] if best.shape[1] > 1 else best[:, 0]
    total = rows.sum(-1, keepdim=True).clamp_min(1e-12)
    return SiteStats(
        load=(rows / total).mean(0),
        entropy=float(torch.special.entr(rows / total).sum(-1).mean()),
        margin=float(margin.mean()),
        tokens=len(rows),
    )


def _decisions(routing: Routing, mask: Tensor | None) -> Float[Tensor, "decisions experts"]:
    dense = routing.dense().float()
    if mask is not None and dense.shape[:-1] == mask.shape:
        return dense[mask.to(dense.device)]
    return dense.reshape(-1, dense.shape[-1])


def load(trace: Trace, mask: Bool[Tensor, "batch seq"] | None = None) -> dict[str, Float[Tensor, " experts"]]:
    """Site -> each expert's share of the weight."""
    return {site: site_stats(routings, mask).load for site, routings in trace.items()}


def agreement(trace: Trace) -> float:
    """How often two sites give a token the same leading expert: the mean over pairs of sites with equal decisions.

    1 where all sites agree on every token; 1 over the number of experts by chance. NaN where no two sites compare.
    """
    leaders: dict[tuple[int, ...], list[Tensor]] = {}
    for routings in trace.values():
        leader = routings[0].leader()
        leaders.setdefault(tuple(leader.shape), []).append(leader.reshape(-1))
    same, pairs = 0.0, 0
    for group in leaders.values():
        for at, one in enumerate(group):
            for other in group[at + 1 :]:
                same += float((one == other).float().mean())
                pairs += 1
    return same / pairs if pairs else float("nan")


def contributions(model: ComposedModel, batch: Batch) -> dict[str, Float[Tensor, " experts"]]:
    """Site -> mean over tokens of ||w_e s_e B_e A_e u|| / ||W u|| for each expert, in one pass of the model as it is.

    ||W u|| includes the bias of the base, where there is one. All tokens of the batch count.
    """
    found: dict[str, Tensor] = {}
    with eval_mode(model), model.trace() as trace, _inputs_of(model) as inputs:
        model(**_forward_inputs(model, batch))
        for site, mixture in model.mixtures.items():
            experts, base = mixture.experts, mixture.base
            if isinstance(experts, LoraExperts) and base is not None and site in inputs:
                found[site] = _ratios(inputs[site], base(inputs[site]), experts, trace[site][-1])
    return found


def _ratios(x: Tensor, base: Tensor, experts: LoraExperts, routing: Routing) -> Float[Tensor, " experts"]:
    weights = routing.dense().float().expand(*x.shape[:-1], routing.num_experts)
    size = base.float().norm(dim=-1).clamp_min(1e-12)
    ratios = torch.zeros(routing.num_experts)
    for row, expert in enumerate(experts.members):
        added = (x @ experts.down[row].T @ experts.up[row].T).float().norm(dim=-1) * experts.scale[row].abs()
        ratios[expert] = float((weights[..., expert].abs() * added / size).mean())
    return ratios


def leave_one_out(
    model: ComposedModel, tasks: Sequence[AbstractTask], experts: Sequence[str] | None = None, metric: str = "nats"
) -> dict[str, float]:
    """Expert -> the mean of `metric` when it may not be chosen, minus that of the model as it is."""
    active = model.active
    whole = evaluate(model, tasks, [composed("whole")]).means(metric)["whole"]
    lost: dict[str, float] = {}
    for expert in experts if experts is not None else active:
        with _without(model, [name for name in active if name != expert]):
            lost[expert] = evaluate(model, tasks, [composed(expert)]).means(metric)[expert] - whole
    return lost


@contextmanager
def _without(model: ComposedModel, others: Sequence[str]) -> Generator[None]:
    before = model.active
    model.set_active(others)
    try:
        yield
    finally:
        model.set_active(None if before == model.experts else before)


@contextmanager
def _inputs_of(model: ComposedModel) -> Generator[dict[str, Tensor]]:
    inputs: dict[str, Tensor] = {}

    def recorder(site: str) -> Any:
        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            del module
            inputs[site] = args[0].detach()

        return record

    with ExitStack() as hooks:
        for site, mixture in model.mixtures.items():
            hooks.callback(mixture.register_forward_pre_hook(recorder(site)).remove)
        yield inputs


def _forward_inputs(model: ComposedModel, batch: Batch) -> dict[str, Any]:
    if batch.kind == "seq2seq":
        decoder = model.prepare_decoder_input_ids_from_labels(labels=batch.targets)
        return {**batch.inputs, "decoder_input_ids": decoder}
    return dict(batch.inputs)
