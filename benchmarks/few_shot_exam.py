"""Test episodes, and how a contender does on them: accuracy of every episode, calibration, intervals, paired gaps.

Episodes are rows of a domain's images, so that weights that do not depend on the episode embed every image once and
all episodes are look-ups; weights that do are made for each support set, and support and queries pass through them.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.few_shot_backbone import pixels
from benchmarks.few_shot_glyphs import Pictures
from mixwright.data.domains import tensor_domain
from mixwright.data.episode_samplers import VariableEpisodes
from mixwright.evaluation.episodes import calibration_error
from mixwright.ops.prototypes import class_means, cosine_scores

WAYS, QUERIES, PER_CLASS, SUPPORT = (8, 16), 2, 3, 40
SEED = 7

Weights = Mapping[str, Tensor]
Embed = Callable[[Tensor, Weights | None], Tensor]
"""(pixels, weights in place of the pretrained ones) -> features."""


@dataclass(frozen=True)
class Rows:
    """An episode: which images of its domain are learned from and which are asked, with their labels."""

    support: Tensor
    labels: Tensor
    query: Tensor
    asked: Tensor

    @property
    def ways(self) -> int:
        return int(self.labels.max()) + 1


@dataclass(frozen=True)
class Score:
    """What a contender got in one domain: the share of right answers of each episode, and its calibration error."""

    accuracy: list[float]
    ece: float

    def plain(self) -> dict[str, Any]:
        return {"accuracy": [round(value, 4) for value in self.accuracy], "ece": self.ece}


def sampler(name: str, given: Pictures, seed: int = SEED, **settings: Any) -> VariableEpisodes:
    """Eight to sixteen ways, one to three shots or so, as unbalanced as they come, two queries a class."""
    rows = torch.arange(len(given.images))[:, None]
    chosen = {"ways": WAYS, "queries": QUERIES, "per_class": PER_CLASS, "support": SUPPORT} | settings
    domain = tensor_domain(name, rows, given.labels)
    return VariableEpisodes(domains=[domain], hierarchy=False, seed=seed, **chosen)


def exam(name: str, given: Pictures, number: int) -> list[Rows]:
    """The first episodes of a domain; the same for every contender."""
    source, found = sampler(name, given), []
    for index in range(number):
        episode = source.episode(index)
        assert episode.query_labels is not None and isinstance(episode.support, Tensor)
        assert isinstance(episode.query, Tensor)
        found.append(Rows(episode.support[:, 0], episode.labels, episode.query[:, 0], episode.query_labels))
    return found


@dataclass
class Exams:
    """All domains' episodes, and the pretrained backbone that frozen features come from."""

    domains: Mapping[str, Pictures]
    embed: Embed
    number: int

    def __post_init__(self) -> None:
        self.episodes = {name: exam(name, given, self.number) for name, given in self.domains.items()}
        self.frozen = {name: self.embedded(name, None) for name in self.domains}

    @torch.no_grad()
    def embedded(self, name: str, weights: Weights | None) -> Tensor:
        """Features of every image of a domain under one set of weights."""
        images = self.domains[name].images
        return torch.cat([self.embed(pixels(part), weights) for part in images.split(256)])

    def fixed(self, weights: Weights | None, number: int | None = None) -> dict[str, Score]:
        """A contender whose weights are the same for every episode."""
        found: dict[str, Score] = {}
        for name, episodes in self.episodes.items():
            features = self.frozen[name] if weights is None else self.embedded(name, weights)
            logits = (answers(features[e.support], features[e.query], e) for e in episodes[:number])
            found[name] = scored(logits, episodes[:number])
        return found

    @torch.no_grad()
    def chosen(self, weights_for: Callable[[Tensor, Tensor], Weights], number: int | None = None) -> dict[str, Score]:
        """A contender that chooses weights by (frozen features of the support, labels)."""
        found: dict[str, Score] = {}
        for name, episodes in self.episodes.items():
            frozen = self.frozen[name]
            logits = (self._under(name, e, weights_for(frozen[e.support], e.labels)) for e in episodes[:number])
            found[name] = scored(logits, episodes[:number])
        return found

    def tuned(self, tune: Callable[[Tensor, Tensor, Tensor], Weights], number: int) -> dict[str, Score]:
        """A contender that trains on the support: (pixels, labels, frozen features) -> weights."""
        found: dict[str, Score] = {}
        for name, episodes in self.episodes.items():
            images, logits = self.domains[name].images, []
            for episode in episodes[:number]:
                weights = tune(pixels(images[episode.support]), episode.labels, self.frozen[name][episode.support])
                with torch.no_grad():
                    logits.append(self._under(name, episode, weights))
            found[name] = scored(logits, episodes[:number])
        return found

    def _under(self, name: str, episode: Rows, weights: Weights) -> Tensor:
        images = self.domains[name].images
        features = self.embed(pixels(images[torch.cat([episode.support, episode.query])]), weights)
        return answers(features[: len(episode.labels)], features[len(episode.labels) :], episode)


def answers(support: Tensor, query: Tensor, episode: Rows) -> Tensor:
    """Logits of the queries: cosines to the class means."""
    return cosine_scores(query, class_means(support, episode.labels, episode.ways))


def scored(logits: Iterator[Tensor] | Sequence[Tensor], episodes: Sequence[Rows]) -> Score:
    """How often each episode's queries were right, and how sure of it."""
    accuracy, sure, hits = [], [], []
    for found, episode in zip(logits, episodes, strict=True):
        confidence, guess = found.softmax(-1).max(-1)
        right = guess == episode.asked
        accuracy.append(right.float().mean().item())
        sure.append(confidence)
        hits.append(right)
    return Score(accuracy, calibration_error(torch.cat(sure), torch.cat(hits)))


@dataclass(frozen=True)
class Mean:
    """A mean over domains with half its 95 % interval, the domains being given and their episodes drawn."""

    value: float
    half: float

    def plain(self) -> list[float]:
        return [self.value, self.half]


def averaged(runs: Sequence[Sequence[Sequence[float]]]) -> Mean:
    """runs[seed][domain][episode] -> the mean over all; seeds are averaged within an episode first."""
    domains = [torch.tensor(parts, dtype=torch.float64).mean(0) for parts in zip(*runs, strict=True)]
    values = [float(part.mean()) for part in domains]
    variance = sum(float(part.var()) / len(part) for part in domains if len(part) > 1)
    return Mean(sum(values) / len(values), 1.96 * math.sqrt(variance) / len(values))
