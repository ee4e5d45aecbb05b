"""The passes of one episode in training, and the gradient with respect to the adapted weights theta, taken by hand.

theta is a leaf here: what leads to it (masks, shared change, router) has its gradients from theta's alone. Support and
queries go through the backbone once each. The queries' cross-entropy has one backward pass, whose gradient is both the
dense teacher's step and the student's own; distillation has a second one, of the queries that it is estimated from.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from mixwright.backbones.eval_mode import eval_mode
from mixwright.data.episodes import Episode
from mixwright.methods.smat.config import SmatConfig
from mixwright.methods.smat.model import FewShotModel
from mixwright.ops.prototypes import class_means, cosine_scores
from mixwright.ops.rows import take

Weights = dict[str, Tensor]
Gradients = list[Tensor | None]


def prototypes_of(support: Float[Tensor, "shots width"], episode: Episode) -> Float[Tensor, "ways width"]:
    """The class means of an episode's support, in float32 or wider."""
    wide = torch.promote_types(support.dtype, torch.float32)
    return class_means(support.to(wide), episode.labels, episode.ways)


def scores(
    queries: Float[Tensor, "queries width"], prototypes: Float[Tensor, "ways width"], scale: float
) -> Float[Tensor, "queries ways"]:
    """Cosines times `scale`, in float32 or wider whatever the backbone computes in."""
    with torch.autocast(queries.device.type, enabled=False):
        return cosine_scores(queries, prototypes, scale)


class _Wish(NamedTuple):
    """A part of the loss, and what it asks of the queries' features (by part) and of the prototypes."""

    value: Tensor
    features: Sequence[Tensor]
    prototypes: Tensor


class _Asked(NamedTuple):
    """The value of an episode, gradients that were taken, and what is still to be gone back through."""

    value: Tensor
    gradients: Gradients | None
    queries: Sequence[Tensor]
    cotangents: Sequence[Tensor]
    on_head: Tensor


class EpisodePasses:
    """(1 - w) CE + w KD of one episode.

    `parts` are rows of the queries; distillation is estimated from those of the first, of which `pretrained` are the
    pretrained model's logits, where it is distilled from.
    """

    def __init__(
        self,
        config: SmatConfig,
        model: FewShotModel,
        episode: Episode,
        parts: Sequence[Tensor],
        pretrained: Float[Tensor, "distilled ways"] | None,
    ) -> None:
        assert episode.query_labels is not None
        self.config, self.model, self.episode = config, model, episode
        self.pretrained = pretrained
        self.queries = [take(episode.query, rows) for rows in parts]
        self.labels = torch.cat([episode.query_labels[rows] for rows in parts])
        self.lift = _lift(episode.labels.device.type)

    def run(self, theta: Weights) -> tuple[Tensor, Gradients]:
        """The value, and the gradients with respect to `theta`; None for weights that the features do not read."""
        support = self.model.features(self.episode.support, theta)
        prototypes = prototypes_of(support, self.episode)
        inner, head = self._inner(theta, support, prototypes)
        found = self._asked(inner, head)
        if inner is theta:  # one pass back for queries and support
            last = self._back([*found.queries, prototypes], theta, [*found.cotangents, found.on_head])
            return found.value, _sums(found.gradients, last)
        last = self._back(found.queries, inner, found.cotangents)
        through_support = self._back([prototypes], theta, [found.on_head])
        return found.value, _sums(_sums(found.gradients, last), through_support)

    def _inner(self, theta: Weights, support: Tensor, prototypes: Tensor) -> tuple[Weights, Tensor]:
        """One step of all weights, the prototypes as the head's among them, on the support.

        First order: the step counts as a constant. So the gradient at theta is the queries' where the step leads, and
        through the prototypes that of the support where it began.
        """
        head, rate = prototypes.detach().requires_grad_(), self.config.inner_rate
        if rate == 0:
            return theta, head
        wish = self._cross_entropy([support], head, self.episode.labels)
        gradients = self._back([support], theta, wish.features, keep=True)
        return _stepped(theta, gradients, rate), (head - rate * wish.prototypes).detach().requires_grad_()

    def _asked(self, inner: Weights, head: Tensor) -> "_Asked":
        """What all queries ask of the weights of their pass and of the prototypes."""
        queries = [self.model.features(inputs, inner) for inputs in self.queries]
        ce, share = self._cross_entropy(queries, head, self.labels), self.config.distillation
        if not self.config.distils:
            return _Asked(ce.value, None, queries, ce.features, ce.prototypes)
        if not self.config.from_teacher:
            kd = self._distillation(queries[0], head, [self.pretrained])
            gradients, asking, wanted = None, queries, [(1 - share) * wish for wish in ce.features]
            wanted[0] = wanted[0] + share * kd.features[0]
        else:
            gradients = self._back(queries[:1], inner, ce.features[:1], keep=True)
            if len(queries) > 1:
                gradients = _sums(gradients, self._back(queries[1:], inner, ce.features[1:]))
            teacher = self._teacher(inner, gradients, head - self.config.teacher_rate * ce.prototypes)
            kd = self._distillation(queries[0], head, [teacher, self.pretrained])
            gradients = [None if each is None else (1 - share) * each for each in gradients]
            asking, wanted = queries[:1], [share * kd.features[0]]
        value = (1 - share) * ce.value + share * kd.value
        return _Asked(value, gradients, asking, wanted, (1 - share) * ce.prototypes + share * kd.prototypes)

    def _teacher(self, inner: Weights, gradients: Gradients, prototypes: Tensor) -> Tensor:
        """Logits of the dense teacher: the student after one step on the queries' cross-entropy."""
        with torch.no_grad(), eval_mode(self.model.backbone):
            stepped = _stepped(inner, gradients, self.config.teacher_rate)
            return scores(self.model.features(self.queries[0], stepped), prototypes, self.config.scale)

    def _cross_entropy(self, queries: Sequence[Tensor], head: Tensor, labels: Tensor) -> _Wish:
        features = [query.detach().requires_grad_() for query in queries]
        logits = scores(torch.cat(features), head, self.config.scale)
        return _wish(cross_entropy(logits, labels), features, head)

    def _distillation(self, query: Tensor, head: Tensor, teachers: Sequence[Tensor | None]) -> _Wish:
        """The sum over teachers of T^2 / 2 KL(teacher || student) at temperature T, the mean over queries."""
        feature, t = query.detach().requires_grad_(), self.config.distillation_temperature
        student = log_softmax(scores(feature, head, self.config.scale) / t, -1)
        terms = [
            kl_div(student, log_softmax(logits.detach() / t, -1), reduction="batchmean", log_target=True)
            for logits in teachers
            if logits is not None
        ]
        return _wish(t * t / 2 * torch.stack(terms).sum(), [feature], head)

    def _back(
        self, outputs: Sequence[Tensor], weights: Weights, cotangents: Sequence[Tensor], *, keep: bool = False
    ) -> Gradients:
        wanted = [self.lift * each.to(out.dtype) for each, out in zip(cotangents, outputs, strict=True)]
        leaves = list(weights.values())
        found = cast(
            Sequence[Tensor | None],
            torch.autograd.grad(outputs, leaves, wanted, retain_graph=keep, allow_unused=True),
        )
        return [None if each is None else each / self.lift for each in found] if self.lift != 1 else list(found)


def _lift(device: str) -> float:
    """What cotangents are multiplied with on their way through the backbone: float16 knows no small numbers."""
    half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    return 1024.0 if half else 1.0


def _wish(value: Tensor, features: list[Tensor], head: Tensor) -> _Wish:
    *on_features, on_head = torch.autograd.grad(value, [*features, head])
    return _Wish(value.detach(), on_features, on_head)


def _stepped(weights: Mapping[str, Tensor], gradients: Gradients, rate: float) -> Weights:
    """Leaves one gradient step further."""
    return {
        name: (tensor if gradient is None else torch.add(tensor, gradient, alpha=-rate)).detach().requires_grad_()
        for (name, tensor), gradient in zip(weights.items(), gradients, strict=True)
    }


def _sums(first: Gradients | None, second: Gradients) -> Gradients:
    """Their sums, None being zero."""
    if first is None:
        return second
    return [b if a is None else a if b is None else a + b for a, b in zip(first, second, strict=True)]
