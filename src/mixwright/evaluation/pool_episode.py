"""One episode of a pool of sparse experts: what was chosen and why, and what the choice and its strength are worth."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from mixwright.backbones.eval_mode import eval_mode
from mixwright.composition.episodic import EpisodicModel
from mixwright.composition.routes import find_route
from mixwright.composition.support import Labelled
from mixwright.evaluation.episodes import calibration_error
from mixwright.ops.prototypes import SCALE, class_means, cosine_scores
from mixwright.routing import Routing, SupportSet

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_ITEMS = 10


@dataclass(frozen=True)
class Measured:
    """How good the weights of a mixture are: accuracy, mean negative log-likelihood, calibration error."""

    accuracy: float
    loss: float
    ece: float


@dataclass(frozen=True)
class ExpertChoice:
    """An expert in one mixture: its weight, how far that moves with other examples, and how far it moves the weights.

    `without`: the same mixture without it; None where it is the only one.
    """

    name: str
    weight: float
    spread: float
    norm: float
    without: Measured | None


@dataclass(frozen=True)
class MovingItem:
    """An example, by its place in the support set: how far the mixture moves when it is left out, 0 to 1."""

    place: int
    name: str
    label: str
    moves: float


@dataclass(frozen=True)
class PoolEpisode:
    """One episode. `measured_on`: queries or, where there were none, the support with each item left out in turn.

    `items` is how many that are; 0 where no class has two examples, so that nothing could be measured.
    """

    name: str
    classes: tuple[str, ...]
    shots: int
    measured_on: str
    items: int
    entropy: float
    doubt: float
    novelty: str
    experts: tuple[ExpertChoice, ...]
    dial: tuple[tuple[float, Measured | None], ...]
    moving: tuple[MovingItem, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@torch.no_grad()
def explain_episode(
    model: EpisodicModel,
    support: Labelled,
    query: SupportSet | None = None,
    *,
    name: str = "the support set",
    items: Sequence[str] = (),
    seed: int = 0,
) -> PoolEpisode:
    """What the pool does for a support set; `query`: labelled items like it. `items` names the examples."""
    known = support.support
    route = find_route(model, support.support, seed=seed)
    weights = route.weights
    dial = tuple((strength, _measure(model, known, query, route.routing, strength)) for strength in STRENGTHS)
    experts = tuple(
        ExpertChoice(
            name=expert,
            weight=float(weights[m]),
            spread=float(route.spread[m]),
            norm=float(route.norms[m]),
            without=_without(model, known, query, route.routing.dense(), m),
        )
        for m, expert in enumerate(model.experts)
    )
    counts = torch.bincount(known.labels, minlength=len(support.classes))
    left_out = int(counts[counts > 1].sum())
    return PoolEpisode(
        name=name,
        classes=support.classes,
        shots=len(known.labels),
        measured_on="items of the support set itself, each left out in turn" if query is None else "query items",
        items=left_out if query is None else len(query.labels),
        entropy=route.entropy,
        doubt=route.doubt,
        novelty="novelty unknown: the pool remembers no tasks" if route.novelty is None else str(route.novelty),
        experts=experts,
        dial=dial,
        moving=_moving(model, support, route.routing.dense(), items),
    )


def _without(
    model: EpisodicModel,
    support: SupportSet,
    query: SupportSet | None,
    weights: Float[Tensor, " *blocks experts"],
    m: int,
) -> Measured | None:
    rest = weights.clone()
    rest[..., m] = 0
    total = rest.sum(-1, keepdim=True)
    if not bool((total > 0).all()):
        return None
    return _measure(model, support, query, Routing(rest / total, weights.shape[-1]), 1.0)


def _measure(
    model: EpisodicModel, support: SupportSet, query: SupportSet | None, routing: Routing, strength: float
) -> Measured | None:
    with model.adapted(routing, strength):
        features = model.settled_features(support.inputs).float()
        if query is None:
            logits, labels = _each_left_out(features, support.labels)
        else:
            prototypes = class_means(features, support.labels, int(support.labels.max()) + 1)
            logits = cosine_scores(model.settled_features(query.inputs).float(), prototypes, SCALE)
            labels = query.labels
    if len(labels) == 0:
        return None
    sure, guess = logits.softmax(-1).max(-1)
    right = guess == labels
    loss = float(cross_entropy(logits, labels))
    return Measured(float(right.double().mean()), loss, calibration_error(sure, right))


def _each_left_out(
    features: Float[Tensor, "shots width"], labels: Int[Tensor, " shots"]
) -> tuple[Float[Tensor, "kept ways"], Int[Tensor, " kept"]]:
    """Logits of each item by prototypes that it is no part of; a class of one item has no prototype left for it."""
    ways = int(labels.max()) + 1
    means, counts = class_means(features, labels, ways), torch.bincount(labels, minlength=ways)
    logits = cosine_scores(features, means, SCALE)
    mine = counts[labels, None].to(features.dtype)
    own = (means[labels] * mine - features) / (mine - 1).clamp_min(1)
    alone = torch.nn.functional.cosine_similarity(features, own, dim=-1, eps=1e-8) * SCALE
    kept = counts[labels] > 1
    return logits.scatter(1, labels[:, None], alone[:, None].to(logits.dtype))[kept], labels[kept]


def _moving(
    model: EpisodicModel, support: Labelled, weights: Float[Tensor, " *blocks experts"], names: Sequence[str]
) -> tuple[MovingItem, ...]:
    """The examples without which the mixture would be another one."""
    labels, experts = support.support.labels, model.mixture.experts
    features = model.frozen_features(support.support.inputs)
    found: list[MovingItem] = []
    with eval_mode(model.mixture.router):
        for place in range(len(labels)):
            rest = torch.arange(len(labels), device=labels.device) != place
            if not bool(rest.any()):
                continue
            _, compact = labels[rest].unique(return_inverse=True)
            routing = model.routing(replace(support.support, labels=compact), features[rest])
            moves = float(experts.mean_over_blocks(experts.by_block(routing.dense() - weights).abs()).sum()) / 2
            name = names[place] if place < len(names) else f"item {place}"
            found.append(MovingItem(place, name, support.classes[int(labels[place])], moves))
    return tuple(sorted(found, key=lambda one: -one.moves)[:_ITEMS])


def best_strength(episode: PoolEpisode) -> float:
    """Where on the dial the loss is least; NaN where nothing was measured."""
    measured = [(one.loss, strength) for strength, one in episode.dial if one is not None]
    return min(measured)[1] if measured else math.nan
