"""A backbone whose weights an episode's support set chooses: adapted for one pass, for a while, or for good."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from mixwright.backbones.eval_mode import eval_mode
from mixwright.composition.features import FeatureExtractor, Features
from mixwright.composition.model import ComposedModel, Composition
from mixwright.composition.parameter_mixture import ParameterMixture
from mixwright.composition.probe import Probe
from mixwright.composition.rollback import Rollback
from mixwright.experts.base import AbstractDeltas
from mixwright.routers.base import AbstractRouter
from mixwright.routing import Condition, Routing, SupportSet


class EpisodicModel(ComposedModel):
    """y = backbone(x; theta + sum_e w_e delta_e), w chosen from the features of a support set under the frozen theta.

    With `condition.support` a pass is under the weights of that support set, and gradients reach router and experts;
    without, under the weights as they stand: the pretrained ones, or those of `adapted` and `commit`, which change them
    in place and take them back to the bit. `features`: see `FeatureExtractor`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        router: AbstractRouter,
        deltas: AbstractDeltas,
        experts: Sequence[str],
        *,
        features: Features = "auto",
        composition: Composition | None = None,
    ) -> None:
        super().__init__(backbone, {}, experts, composition, Probe({}, False))
        self.mixture = ParameterMixture(backbone, router, deltas)
        self.mixture.channel = self.channel
        self.feature_kind = features
        self._rollback = Rollback(backbone)

    def forward(
        self, *args: Any, condition: Condition | None = None, task_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """One pass of the backbone, under the weights that `condition.support` chooses where there is one."""
        given = condition or self._given
        if given.support is None or not self.channel.enabled:
            return super().forward(*args, condition=condition, task_ids=task_ids, **kwargs)
        weights = self.weights_for(self.routing(given.support))
        with self.under(condition):
            return functional_call(self.backbone, weights, args, kwargs)

    def features(self, inputs: Any, weights: Mapping[str, Tensor] | None = None) -> Float[Tensor, "items width"]:
        """Features of a batch of inputs, under the weights as they stand or with some of them replaced."""
        extractor = FeatureExtractor(self.backbone, self.feature_kind)
        if weights is None:
            return extractor(inputs)
        return functional_call(extractor, {f"backbone.{name}": tensor for name, tensor in weights.items()}, (inputs,))

    def frozen_features(self, inputs: Any) -> Float[Tensor, "items width"]:
        """Features under the pretrained weights, in evaluation, without gradients."""
        with eval_mode(self.backbone):
            return self.features(inputs, self._rollback.pristine() if self._rollback.depth else None)

    def routing(self, support: SupportSet, features: Float[Tensor, "shots width"] | None = None) -> Routing:
        """How much each expert counts for a support set; `features`: its frozen features, where they are known."""
        known = self.frozen_features(support.inputs) if features is None else features
        return self.mixture.route(known, Condition(support=support))

    def weights_for(self, routing: Routing, strength: float = 1.0) -> dict[str, Tensor]:
        """The parameters of the backbone under a routing: pretrained + strength * (their change)."""
        return self.mixture.weights(self._rollback.pristine(), routing, strength)

    @torch.no_grad()
    def commit(self, support: SupportSet | Routing, strength: float = 1.0) -> Routing:
        """Change the backbone's weights in place, to those for a support set, until `rollback`."""
        routing = support if isinstance(support, Routing) else self._settled_routing(support)
        self._rollback.apply(self.weights_for(routing, strength))
        return routing

    def rollback(self) -> None:
        """Take back the last `commit`, to the bit. Raises ValueError where nothing was committed."""
        self._rollback.undo()

    @contextmanager
    def adapted(self, support: SupportSet | Routing, strength: float = 1.0) -> Generator[Routing]:
        """Inside the block the backbone's weights are those for a support set; then they are what they were."""
        routing = self.commit(support, strength)
        depth = self._rollback.depth
        try:
            yield routing
        finally:
            while self._rollback.depth >= depth:
                self._rollback.undo()

    def remove(self) -> nn.Module:
        """The backbone as it was pretrained, gradients asked for included."""
        while self._rollback.depth:
            self._rollback.undo()
        return super().remove()

    def _settled_routing(self, support: SupportSet) -> Routing:
        with eval_mode(self.mixture.router):
            return self.routing(support)

    def _mixed(self) -> Mapping[str, Any]:
        return {self.mixture.site: self.mixture}

    def kept_tensors(self) -> list[Tensor]:
        """Router and experts."""
        return list(self._own())

    def _own(self) -> Iterator[Tensor]:
        for part in (self.mixture.router, self.mixture.experts):
            yield from part.state_dict(keep_vars=True).values()
