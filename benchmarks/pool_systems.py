"""Every system of the PHATGOOSE comparison over one trained pool, as one composed model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from benchmarks.side_by_side import Parts
from benchmarks.trained_pool import TrainedPool
from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel
from mixwright.data.collate import Batch
from mixwright.evaluation import systems
from mixwright.evaluation.activations import Moments, average_activations, moments
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
MERGES = (0.2, 0.3, 0.5, 1.0)
QUALITIES = (0.03, 0.1, 0.3, 1.0)
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

CORE = (
    "backbone",
    "merged product",
    "merged, weight chosen",
    "parameter average",
    "multitask LoRA (sees all data)",
    "retrieval",
    "random prototypes",
    "Arrow",
    "average activation",
    "PHATGOOSE",
    "PHATGOOSE, k=1",
    "PHATGOOSE, k=all",
    "PHATGOOSE + pooling",
    "PHATGOOSE + consensus",
    "signature (rank 16)",
    "signature + pooling",
)


@dataclass(frozen=True)
class OwnText:
    """Batches of each expert's own training text, in the order of the pool: for averages, signatures and retrieval."""

    averages: Sequence[Sequence[Batch]]
    library: Sequence[Sequence[Batch]]


def composed_pool(backbone: nn.Module, pool: TrainedPool) -> ComposedModel:
    """PHATGOOSE: the pool's experts and gates, top 2."""
    mixtures: dict[str, Mixture] = {}
    for site, experts in lora_experts(pool.parts).items():
        router = TokenRouter(PrototypeScores(pool.parts.gates[site]), TOP_K)
        mixtures[site] = Mixture(backbone.get_submodule(site), router, experts)
    return ComposedModel(backbone, mixtures, pool.names)


def lora_experts(parts: Parts) -> dict[str, LoraExperts]:
    """Stacked factors as experts."""
    scale = torch.full((parts.count,), parts.scale)
    return {site: LoraExperts(down, parts.up[site], scale, parts.count) for site, down in parts.down.items()}


def all_systems(
    model: ComposedModel,
    pool: TrainedPool,
    own: OwnText,
    validation: Sequence[AbstractTask],
    metric: str,
    seed: int,
    core: bool = False,
) -> tuple[list[System], dict[str, str]]:
    """The systems, and which settings were chosen on held-in validation; with `core` only those of `CORE`."""
    gates: dict[str, AbstractScores] = {site: PrototypeScores(rows) for site, rows in pool.parts.gates.items()}
    average = average_activations(model, own.averages)
    signs = _signatures(model, own.averages, (0, 16))
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
    chosen: dict[str, str] = {}

    def keep_best(name: str, tried: dict[str, System]) -> None:
        if core and name not in CORE:
            return
        means = evaluate(model, validation, list(tried.values())).means(metric)
        best = (min if metric in LOWER_IS_BETTER else max)(tried, key=means.__getitem__)
        chosen[name] = best
        found.append(replace(tried[best], name=name))

    for scores, names in ((gates, SHARINGS), (signs[16], SIGNATURE_SHARINGS)):
        for name, grid in names.items():
            settings = {str(sharing): sharing for sharing in grid}
            keep_best(name, {t: systems.scored(t, model, scores, TOP_K, sharing=s) for t, s in settings.items()})
    keep_best("merged, weight chosen", {f"weight={w}": systems.merged(model, w, f"weight={w}") for w in MERGES})
    if core:
        return [system for system in found if system.name in {*CORE, *pool.names}], chosen
    plain, weighted = noisy_systems(model, pool, validation)
    found.append(plain)
    keep_best("PHATGOOSE, a random expert more, quality", weighted)
    return found, chosen


def noisy_systems(
    model: ComposedModel, pool: TrainedPool, validation: Sequence[AbstractTask]
) -> tuple[System, dict[str, System]]:
    """The pool with one random-weight expert more, whose gate was trained like the others on the first expert's task.

    With `quality` q each expert's score has q times its measured gain over the backbone added, in nats per token on its
    own validation text.
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
    alone = {system.name: system for system in systems.single_experts(model)}
    own = [(alone[name], task) for name, task in zip(pool.names, validation, strict=True)]
    own.append((systems.adapter("noise", lora_experts(pool.noise)), validation[0]))
    gains = torch.tensor([_gain(model, system, task) for system, task in own])
    plain = systems.scored("PHATGOOSE, a random expert more", model, gates, TOP_K, experts=experts)
    weighted = {
        f"quality={q}": systems.scored(f"quality={q}", model, gates, TOP_K, experts=experts, offset=q * gains)
        for q in QUALITIES
    }
    return plain, weighted


def _gain(model: ComposedModel, system: System, task: AbstractTask) -> float:
    means = evaluate(model, [task], [systems.backbone(), system]).means("nats")
    return means["backbone"] - means[system.name]


def _signatures(
    model: ComposedModel, examples: Sequence[Sequence[Batch]], ranks: tuple[int, ...]
) -> dict[int, dict[str, AbstractScores]]:
    """Rank -> site -> scores, from one look at each expert's text."""
    seen: list[dict[str, Moments]] = []
    for batches in examples:
        with model.disabled():
            seen.append(moments(model, batches, paired=True))
    return {
        rank: {
            site: SignatureScores.from_signatures([found[site].signature(rank) for found in seen]) for site in seen[0]
        }
        for rank in ranks
    }
