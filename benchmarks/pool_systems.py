"""Every system of the PHATGOOSE comparison over one trained pool, as one composed model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.side_by_side import Parts
from benchmarks.trained_pool import TrainedPool
from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel
from mixwright.data.collate import Batch
from mixwright.evaluation import systems
from mixwright.evaluation.activations import average_activations, moments
from mixwright.evaluation.evaluate import evaluate
from mixwright.evaluation.retrieval import build_library, mean_state
from mixwright.evaluation.scores import LOWER_IS_BETTER, AbstractTask
from mixwright.evaluation.systems import Sharing, System
from mixwright.experts.lora import LoraExperts
from mixwright.routers.base import AbstractScores
from mixwright.routers.gate import PrototypeScores
from mixwright.routers.signature import SignatureScores
from mixwright.routers.token import TokenRouter

TOP_K = 2
SHARINGS = {
    "PHATGOOSE + consensus": [Sharing(consensus=beta) for beta in (0.1, 0.3, 1.0, 3.0)],
    "PHATGOOSE + pooling": [Sharing(pooling=decay) for decay in (0.5, 0.8, 0.95)],
    "PHATGOOSE + sequence prior": [Sharing(prior=gamma) for gamma in (0.3, 1.0, 3.0)],
    "PHATGOOSE + consensus + pooling": [Sharing(consensus=b, pooling=d) for b in (1.0, 3.0) for d in (0.5, 0.8)],
}
SIGNATURE_SHARINGS = {
    "signature + consensus": [Sharing(consensus=beta) for beta in (0.1, 0.3, 1.0, 3.0)],
    "signature + pooling": [Sharing(pooling=decay) for decay in (0.5, 0.8, 0.95)],
}


@dataclass(frozen=True)
class OwnText:
    """Batches of each expert's own training text, in the order of the pool: for averages, signatures and retrieval."""

    averages: Sequence[Sequence[Batch]]
    library: Sequence[Sequence[Batch]]


def composed_pool(backbone: nn.Module, pool: TrainedPool) -> ComposedModel:
    """PHATGOOSE: the pool's experts and gates, top 2."""
    experts = lora_experts(pool.parts)
    mixtures = {
        site: Mixture(backbone.get_submodule(site), TokenRouter(PrototypeScores(pool.parts.gates[site]), TOP_K), members)
        for site, members in experts.items()
    }
    return ComposedModel(backbone, mixtures, pool.names)


def lora_experts(parts: Parts) -> dict[str, LoraExperts]:
    """Stacked factors as experts."""
    scale = torch.full((parts.count,), parts.scale)
    return {site: LoraExperts(down, parts.up[site], scale, parts.count) for site, down in parts.down.items()}


def all_systems(
    model: ComposedModel, pool: TrainedPool, own: OwnText, validation: Sequence[AbstractTask], metric: str, seed: int
) -> tuple[list[System], dict[str, str]]:
    """The systems, and which settings were chosen on held-in validation."""
    gates: dict[str, AbstractScores] = {site: PrototypeScores(rows) for site, rows in pool.parts.gates.items()}
    average = average_activations(model, own.averages)
    signs = {rank: _signatures(model, own.averages, rank) for rank in (0, 16)}
    found = [
        systems.backbone(),
        *systems.single_experts(model),
        systems.merged(model),
        systems.parameter_average(model),
        systems.adapter("multitask LoRA (sees all data)", lora_experts(pool.multitask)),
        systems.retrieval(model, build_library(model, own.library, mean_state)),
        systems.random_prototypes(model, TOP_K, seed),
        systems.arrow(model, TOP_K),
        systems.spectral(model, 1),
        systems.prototypes("average activation", model, average, TOP_K),
        systems.composed("PHATGOOSE"),
        systems.scored("PHATGOOSE, k=1", model, gates, 1),
        systems.scored("PHATGOOSE, k=all", model, gates, len(pool.names)),
        systems.scored("PHATGOOSE + null expert", model, gates, TOP_K, sharing=Sharing(null_expert=0.0)),
        systems.scored("signature (diagonal)", model, signs[0], TOP_K),
        systems.scored("signature (rank 16)", model, signs[16], TOP_K),
    ]
    found += noisy_systems(model, pool, validation)
    chosen: dict[str, str] = {}
    grids = [(gates, SHARINGS), (signs[16], SIGNATURE_SHARINGS)]
    for scores, names in grids:
        for name, grid in names.items():
            tried = [systems.scored(str(sharing), model, scores, TOP_K, sharing=sharing) for sharing in grid]
            means = evaluate(model, validation, tried).means(metric)
            best = min(means, key=means.__getitem__) if metric in LOWER_IS_BETTER else max(means, key=means.__getitem__)
            chosen[name] = best
            setting = next(sharing for sharing in grid if str(sharing) == best)
            found.append(systems.scored(name, model, scores, TOP_K, sharing=setting))
    return found, chosen


def noisy_systems(model: ComposedModel, pool: TrainedPool, validation: Sequence[AbstractTask]) -> list[System]:
    """The pool with one random-weight expert more, whose gate was trained like the others on the first expert's task.

    With `quality` each expert's score has its measured gain over the backbone added, in nats per token on its own
    validation text.
    """
    parts = Parts(
        pool.parts.scale,
        {site: torch.cat([down, pool.noise.down[site]]) for site, down in pool.parts.down.items()},
        {site: torch.cat([up, pool.noise.up[site]]) for site, up in pool.parts.up.items()},
    )
    experts = lora_experts(parts)
    gates: dict[str, AbstractScores] = {
        site: PrototypeScores(torch.cat([rows, pool.noise.gates[site]])) for site, rows in pool.parts.gates.items()
    }
    base = evaluate(model, validation, [systems.backbone()]).means
    own = [*zip(pool.names, validation, strict=True)]
    alone = {system.name: system for system in systems.single_experts(model)}
    gains = [_gain(model, alone[name], task, base("nats", [task.name])["backbone"]) for name, task in own]
    noise = systems.adapter("noise", lora_experts(pool.noise))
    gains.append(_gain(model, noise, validation[0], base("nats", [validation[0].name])["backbone"]))
    return [
        systems.scored("PHATGOOSE, a random expert more", model, gates, TOP_K, experts=experts),
        systems.scored(
            "PHATGOOSE, a random expert more, quality", model, gates, TOP_K, experts=experts, offset=torch.tensor(gains)
        ),
    ]


def _gain(model: ComposedModel, system: System, task: AbstractTask, base: float) -> float:
    return base - evaluate(model, [task], [system]).means("nats")[system.name]


def _signatures(model: ComposedModel, examples: Sequence[Sequence[Batch]], rank: int) -> dict[str, AbstractScores]:
    each: list[dict[str, dict[str, Tensor]]] = []
    for batches in examples:
        with model.disabled():
            seen = moments(model, batches, paired=rank > 0)
        each.append({site: found.signature(rank) for site, found in seen.items()})
    return {site: SignatureScores.from_signatures([signature[site] for signature in each]) for site in each[0]}
