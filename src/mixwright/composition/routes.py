"""The route of a support set: the choice itself, its doubt over resampled supports, its distance to tasks seen."""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixwright.backbones.eval_mode import eval_mode
from mixwright.composition.episodic import EpisodicModel
from mixwright.composition.route import Route, RoutedBlocks
from mixwright.composition.seen_tasks import SeenTasks
from mixwright.composition.support import Given
from mixwright.data.episodes import Episode
from mixwright.experts.base import AbstractDeltas
from mixwright.experts.sparse_deltas import SparseDeltas
from mixwright.ops.prototypes import class_means
from mixwright.routing import Condition, Routing, SupportSet


def find_route(model: EpisodicModel, support: Given, *, resamples: int = 32, seed: int = 0) -> Route:
    """What the model's router says of a support set. Raises ValueError or TypeError for a support with a fault.

    `resamples`: supports drawn from this one with replacement, of which the spread of each weight is measured; a class
    that is not drawn is not there.
    """
    if resamples < 0:
        raise ValueError(f"resamples {resamples}: expected 0 or more.")
    known = model.labelled(support)
    labels = known.support.labels
    features = model.support_features(known.support)
    with eval_mode(model.mixture.router):
        routing = model.routing(known.support, features)
        drawn = _resampled(model, features, labels, resamples, seed)
    experts = model.mixture.experts
    blocks, weights = _blocks(experts), routing.dense()
    if blocks is not None:
        weights = experts.by_block(weights)
        routing = Routing(weights, routing.num_experts)
    spread = drawn.std(0) if resamples > 1 else torch.zeros_like(weights)
    seen = SeenTasks.read(model.whole)
    return Route(
        routing=routing,
        names=model.experts,
        norms=weights * experts.norms() if blocks is None else blocks.moved(weights),
        spread=spread if blocks is None else blocks.mean(spread),
        blocks=blocks,
        novelty=None if seen is None else seen.novelty(task_point(features, labels)),
        classes=known.classes,
    )


def task_point(features: Float[Tensor, "shots width"], labels: Int[Tensor, " shots"]) -> Float[Tensor, " width"]:
    """Where a task lies: the mean of its class prototypes, under the pretrained weights."""
    return class_means(features.float(), labels, int(labels.max()) + 1).mean(0)


def remember_tasks(model: EpisodicModel, episodes: Iterable[Episode]) -> int:
    """Keep where these tasks lie, with their domains, in place of what was kept; returns how many. They are saved."""
    device = next(model.backbone.parameters()).device
    points: list[Tensor] = []
    domains: list[str] = []
    for episode in episodes:
        here = episode.to(device)
        points.append(task_point(model.frozen_features(here.support), here.labels))
        domains.append(str(episode.meta.get("domain", "episode")))
    model.whole.update(SeenTasks.of(points, domains).tensors())
    return len(points)


def _resampled(
    model: EpisodicModel, features: Tensor, labels: Tensor, resamples: int, seed: int
) -> Float[Tensor, "resamples *blocks experts"]:
    """The weights of each drawn support. What was put in the router's place, or traced, is not asked again."""
    draw = torch.Generator().manual_seed(seed)
    experts = model.mixture.experts
    found: list[Tensor] = []
    for _ in range(resamples):
        rows = torch.randint(len(labels), (len(labels),), generator=draw).to(labels.device)
        _, compact = labels[rows].unique(return_inverse=True)
        condition = Condition(support=SupportSet(None, compact))
        routing: Routing = model.channel.override or model.mixture.router(features[rows], condition)
        found.append(experts.by_block(routing.dense()) if experts.blocks else routing.dense())
    return torch.stack(found) if found else features.new_zeros(0, len(model.experts))


def _blocks(experts: AbstractDeltas) -> RoutedBlocks | None:
    if not isinstance(experts, SparseDeltas) or not experts.blocks:
        return None
    norms = experts.norms_by_block()
    return RoutedBlocks(experts.blocks, norms.new_tensor(experts.shares), norms)
