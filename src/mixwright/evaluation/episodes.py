"""Few-shot models scored over many episodes: accuracy with its interval, calibration, and paired differences."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mixwright.composition.episodic import EpisodicModel
from mixwright.data.episodes import Episode, EpisodeSource
from mixwright.ops.prototypes import SCALE, class_means, cosine_scores
from mixwright.ops.rows import count, join

Predict = Callable[[Episode], Tensor]
"""An episode -> logits of its queries (queries, ways). It may not read `query_labels`: `score` hides them."""

BINS = 10


@dataclass(frozen=True)
class EpisodeScores:
    """What a system got over episodes: `accuracy` of each, and for each query how sure it was and whether it was right.

    Intervals are mean +- 1.96 std / sqrt(n) over episodes, as the few-shot literature reports them; over one episode
    there is none (NaN).
    """

    accuracy: Float[Tensor, " episodes"]
    confidence: Float[Tensor, " queries"]
    right: Bool[Tensor, " queries"]
    domains: tuple[str, ...]

    @property
    def mean(self) -> float:
        """Accuracy, the mean over episodes."""
        return float(self.accuracy.double().mean())

    @property
    def half_width(self) -> float:
        """Half the 95 % interval of the mean."""
        return half_width(self.accuracy)

    @property
    def ece(self) -> float:
        """Expected calibration error over all queries."""
        return calibration_error(self.confidence, self.right)

    def minus(self, other: "EpisodeScores") -> tuple[float, float]:
        """The mean of the paired differences over the same episodes, and half its 95 % interval.

        Raises ValueError for scores over other episodes.
        """
        if self.domains != other.domains:
            raise ValueError("paired differences need the same episodes for both systems.")
        gaps = self.accuracy.double() - other.accuracy.double()
        return float(gaps.mean()), half_width(gaps)

    def plain(self) -> dict[str, Any]:
        """For JSON: mean, half width, calibration error, number of episodes and queries."""
        half = self.half_width
        return {
            "accuracy": self.mean,
            "half_width": None if math.isnan(half) else half,
            "ece": self.ece,
            "episodes": len(self.accuracy),
            "queries": len(self.right),
        }


def score(predict: Predict, episodes: EpisodeSource | Sequence[Episode], number: int | Iterable[int]) -> EpisodeScores:
    """`predict` over episodes 0 to `number` - 1, or over those numbers.

    Raises ValueError for no episodes, for one without query labels, and for logits that are not finite.
    """
    chosen = range(number) if isinstance(number, int) else number
    accuracy: list[float] = []
    confidence: list[Tensor] = []
    right: list[Tensor] = []
    domains: list[str] = []
    for index in chosen:
        episode = episodes[index] if isinstance(episodes, Sequence) else episodes.episode(index)
        sure, hits = _scored(predict, episode)
        accuracy.append(float(hits.double().mean()))
        confidence.append(sure)
        right.append(hits)
        domains.append(episode.where[0])
    if not accuracy:
        raise ValueError("no episodes to score; give one or more.")
    return EpisodeScores(torch.tensor(accuracy), torch.cat(confidence), torch.cat(right), tuple(domains))


def calibration_error(
    confidence: Float[Tensor, " queries"], right: Bool[Tensor, " queries"], bins: int = BINS
) -> float:
    """sum_b n_b / n |accuracy_b - confidence_b| over bins of equal width (Guo et al. 2017, equation 3)."""
    place = (confidence.double() * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.float64).index_add(0, place, right.double() - confidence.double())
    return float(gaps.abs().sum() / len(confidence))


def half_width(values: Float[Tensor, " episodes"]) -> float:
    """1.96 std / sqrt(n), half the 95 % interval of a mean; NaN for a single value."""
    return math.nan if len(values) < 2 else 1.96 * float(values.double().std()) / math.sqrt(len(values))


def by_prototypes(features: Callable[[Any], Tensor], scale: float = SCALE) -> Predict:
    """Cosines to class means of whatever `features` says of items, support and queries in one pass."""

    @torch.no_grad()
    def predict(episode: Episode) -> Tensor:
        found = features(join(episode.support, episode.query))
        shots = count(episode.support)
        return cosine_scores(found[shots:], class_means(found[:shots], episode.labels, episode.ways), scale)

    return predict


def pretrained(model: EpisodicModel, scale: float = SCALE) -> Predict:
    """The frozen backbone's own prototypes."""
    return by_prototypes(model.frozen_features, scale)


def direct(model: EpisodicModel, strength: float = 1.0, scale: float = SCALE) -> Predict:
    """Prototypes under the weights that each episode's support chooses, with no gradient step."""

    def predict(episode: Episode) -> Tensor:
        with torch.no_grad():
            weights = model.weights_for(model.settled_routing(episode.support_set), strength)
        return by_prototypes(lambda inputs: model.settled_features(inputs, weights), scale)(episode)

    return predict


def _scored(predict: Predict, episode: Episode) -> tuple[Tensor, Tensor]:
    if episode.query_labels is None:
        raise ValueError(f"{episode.where[0]}: its queries have no labels to be scored by.")
    hidden = Episode(episode.support, episode.labels, episode.query, None, episode.meta)
    logits = predict(hidden).detach().float().cpu()
    if not bool(logits.isfinite().all()):
        raise ValueError(f"{episode.where[0]}: the model gives scores that are not finite.")
    sure, chosen = logits.softmax(-1).max(-1)
    return sure, chosen == episode.query_labels.cpu()
