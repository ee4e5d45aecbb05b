"""The loss of an episode (sheet a5): cross-entropy on its queries, two distillation terms, sparsity, gates."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from mixwright.data.episodes import Episode
from mixwright.methods.smat.config import SmatConfig
from mixwright.methods.smat.diversity_term import diversity_term
from mixwright.methods.smat.episode_passes import EpisodePasses, prototypes_of, scores
from mixwright.methods.smat.frozen_features import FrozenFeatures
from mixwright.methods.smat.known_gradient import promise
from mixwright.methods.smat.model import FewShotModel
from mixwright.methods.smat.sparsity_term import sparsity_term
from mixwright.ops.rows import join, take
from mixwright.routing import Routing


class EpisodeLoss:
    """L = (1 - w) CE + w KD + sum_m lambda_m b_m (q_m - (1 - tau)) + penalty: Chen et al. 2024, section 3.

    In evaluation the cross-entropy alone, by direct inference: no inner step, no teacher, and no query label is read
    but for the loss itself.
    """

    def __init__(self, config: SmatConfig, note: Callable[[Tensor], None] | None = None) -> None:
        """`note` is told each episode's mixture in training."""
        self.config, self.note, self.at_once = config, note, config.at_once
        self.frozen = FrozenFeatures(config.frozen_cache)

    def __call__(self, model: FewShotModel, episode: Episode) -> Float[Tensor, ""]:
        """The loss of one episode. Raises ValueError where it does not say what its queries are."""
        if model.training:
            return self.together(model, [episode])
        return cross_entropy(self.predict(model, episode), _query_labels(episode))

    def together(self, model: FewShotModel, episodes: Sequence[Episode]) -> Float[Tensor, ""]:
        """The summed loss of episodes in training: their weights are merged in one pass over the masks, and the
        gradients of masks and shared change are taken in one."""
        config = self.config
        parts = [self._parts(len(_query_labels(episode)), episode.labels.device) for episode in episodes]
        looked = [self._looked_at(model, episode, rows[0]) for episode, rows in zip(episodes, parts, strict=True)]
        routings = [routing for routing, _, _ in looked]
        for routing in routings if self.note is not None else ():
            self.note(routing.dense())  # type: ignore[misc]
        thetas = model.weights_for_each(routings)
        loss, gradients = promise([tensor for theta in thetas for tensor in theta.values()])
        leaves = [{name: tensor.detach().requires_grad_() for name, tensor in theta.items()} for theta in thetas]
        del thetas
        for episode, rows, (_, gates, pretrained) in zip(episodes, parts, looked, strict=True):
            value, found = EpisodePasses(config, model, episode, rows, pretrained).run(leaves.pop(0))
            gradients += found
            loss = loss + value
            if gates is not None:
                loss = loss + config.gate_penalty * gates.square().mean()
        if config.is_constrained:
            deltas, sparsity = model.deltas, config.sparsity_at(model.router.progress)
            mixtures = [deltas.mean_over_blocks(deltas.by_block(routing.dense())) for routing in routings]
            loss = loss + sparsity_term(deltas, torch.stack(mixtures), sparsity, config.floor)
            if config.diversity:
                loss = loss + len(episodes) * config.diversity * diversity_term(deltas)
        return loss

    @torch.no_grad()
    def predict(self, model: FewShotModel, episode: Episode) -> Float[Tensor, "queries ways"]:
        """Logits of the queries by direct inference, one pass of the support and one of the queries."""
        frozen = self.frozen(model, episode.support) if self.config.routes else None
        theta = model.weights_for(self._routing(model, episode, frozen)[0])
        prototypes = prototypes_of(model.features(episode.support, theta), episode)
        return scores(model.features(episode.query, theta), prototypes, self.config.scale)

    def _looked_at(
        self, model: FewShotModel, episode: Episode, rows: Tensor
    ) -> tuple[Routing, Tensor | None, Tensor | None]:
        """What the pretrained model's one pass is for: the routing, its gates, and its own logits of these queries."""
        distils = self.config.distils and self.config.from_pretrained
        if not distils and not self.config.routes:
            return *self._routing(model, episode, None), None
        shots = len(episode.labels)
        items = join(episode.support, take(episode.query, rows)) if distils else episode.support
        frozen = self.frozen(model, items)
        found = self._routing(model, episode, frozen[:shots])
        if not distils:
            return *found, None
        return *found, scores(frozen[shots:], prototypes_of(frozen[:shots], episode), self.config.scale)

    def _routing(self, model: FewShotModel, episode: Episode, frozen: Tensor | None) -> tuple[Routing, Tensor | None]:
        """The routing, and the gates' logits where there are gates."""
        if model.channel.override is not None:
            return model.channel.override, None
        if frozen is None or not self.config.routes:
            allowed = model.router.allowed.float()
            return Routing(allowed / allowed.sum(), len(allowed)), None
        gates = model.router.logits(frozen, episode.labels)
        return model.router.routing(gates), gates

    def _parts(self, queries: int, device: torch.device) -> list[Tensor]:
        """Rows of the queries: those that distillation is estimated from, and the others."""
        chosen = max(1, round(self.config.distilled * queries))
        if not self.config.distils or chosen >= queries:
            return [torch.arange(queries, device=device)]
        order = torch.randperm(queries).to(device)
        return [order[:chosen].sort().values, order[chosen:].sort().values]


def _query_labels(episode: Episode) -> Tensor:
    if episode.query_labels is None:
        raise ValueError(f"{episode.where[0]}: query_labels: missing; a loss needs them.")
    return episode.query_labels
