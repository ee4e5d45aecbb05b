"""The loss of an episode (sheet a5): cross-entropy on its queries, two distillation terms, sparsity, gates."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from mixwright.data.episodes import Episode
from mixwright.methods.smat.config import SmatConfig
from mixwright.methods.smat.model import FewShotModel
from mixwright.ops.prototypes import class_means, cosine_scores
from mixwright.ops.rows import count, join


class Forward(NamedTuple):
    """Class prototypes and logits of the queries under some weights."""

    prototypes: Float[Tensor, "ways width"]
    logits: Float[Tensor, "queries ways"]


class EpisodeLoss:
    """L = (1 - w) CE + w KD + sum_m lambda_m a_m (q_m - (1 - tau)) + penalty: Chen et al. 2024, section 3.

    In evaluation the cross-entropy alone, by direct inference: no inner step, no teacher, and no query label is read
    but for the loss itself.
    """

    def __init__(self, config: SmatConfig) -> None:
        self.config = config

    def __call__(self, model: FewShotModel, episode: Episode) -> Tensor:
        """The loss of one episode, a scalar."""
        assert episode.query_labels is not None
        frozen = model.frozen_features(join(episode.support, episode.query))
        shots = count(episode.support)
        gates = model.router.logits(frozen[:shots], episode.labels)
        routing = model.router.routing(gates)
        theta = model.weights_for(routing)
        if not model.training:
            logits = self.predict(model, theta, episode).logits
            return cross_entropy(logits, episode.query_labels)
        if self.config.inner_rate:
            theta = self._inner(model, theta, episode)
        student = self.predict(model, theta, episode)
        loss = cross_entropy(student.logits, episode.query_labels)
        teachers: list[Tensor] = []
        if self.config.from_teacher:
            teachers.append(self._teacher(model, theta, loss, episode))
        if self.config.from_pretrained:
            teachers.append(self._scores(frozen[:shots], frozen[shots:], episode).logits)
        if teachers and self.config.distillation:
            share = self.config.distillation
            distilled = torch.stack([self._divergence(student.logits, one) for one in teachers]).sum() / 2
            loss = (1 - share) * loss + share * distilled
        return loss + self._sparsity(model, routing.dense()) + self.config.gate_penalty * gates.square().mean()

    def predict(self, model: FewShotModel, theta: Mapping[str, Tensor], episode: Episode) -> Forward:
        """Support and queries in one pass under `theta`."""
        features = model.features(join(episode.support, episode.query), theta)
        shots = count(episode.support)
        return self._scores(features[:shots], features[shots:], episode)

    def _scores(self, support: Tensor, queries: Tensor, episode: Episode) -> Forward:
        prototypes = class_means(support, episode.labels, episode.ways)
        return Forward(prototypes, cosine_scores(queries, prototypes, self.config.scale))

    def _inner(self, model: FewShotModel, theta: Mapping[str, Tensor], episode: Episode) -> dict[str, Tensor]:
        """One first-order step on the support's own cross-entropy; the gradient counts as a constant."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in theta.items()}
        features = model.features(episode.support, leaves)
        prototypes = class_means(features, episode.labels, episode.ways)
        loss = cross_entropy(cosine_scores(features, prototypes, self.config.scale), episode.labels)
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return {
            name: tensor - self.config.inner_rate * gradient
            for (name, tensor), gradient in zip(theta.items(), gradients, strict=True)
        }

    def _teacher(self, model: FewShotModel, theta: Mapping[str, Tensor], loss: Tensor, episode: Episode) -> Tensor:
        """Logits of the dense teacher: theta after one step on the queries' cross-entropy."""
        gradients = torch.autograd.grad(
            loss, list(theta.values()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        with torch.no_grad():
            stepped = {
                name: tensor - self.config.teacher_rate * gradient
                for (name, tensor), gradient in zip(theta.items(), gradients, strict=True)
            }
            return self.predict(model, stepped, episode).logits

    def _divergence(self, logits: Tensor, teacher: Tensor) -> Tensor:
        """T^2 KL(teacher || student) at temperature T, the mean over queries."""
        t = self.config.distillation_temperature
        return (
            t
            * t
            * kl_div(
                log_softmax(logits / t, -1),
                log_softmax(teacher.detach() / t, -1),
                reduction="batchmean",
                log_target=True,
            )
        )

    def _sparsity(self, model: FewShotModel, weights: Float[Tensor, " experts"]) -> Tensor:
        """Its gradient on masks is by the smooth q_m, on multipliers by the counted sparsity (proxy constraints)."""
        deltas, target = model.deltas, 1 - self.config.sparsity
        smooth = deltas.multipliers.detach() * (deltas.expected_l0() - target)
        counted = deltas.multipliers * ((1 - deltas.sparsity()) - target)
        return (weights.detach() * (smooth + counted - counted.detach())).sum()
