"""A backbone whose weights an episode's support set chooses: adapted for one pass, for a while, or for good."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixwright.backbones.eval_mode import eval_mode
from mixwright.composition.checkpointing import checkpoint_options
from mixwright.composition.features import FeatureExtractor, Features
from mixwright.composition.model import ComposedModel, Composition
from mixwright.composition.parameter_mixture import ParameterMixture
from mixwright.composition.probe import Probe
from mixwright.composition.rollback import Rollback
from mixwright.composition.substitution import in_place_of
from mixwright.experts.base import AbstractDeltas
from mixwright.ops.rows import Inputs, count, take
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
        self.feature_kind: Features = features
        self._rollback = Rollback(backbone)
        self._trained = [module for module in backbone.modules() if module.training]
        self._in_force: Mapping[str, Tensor] = {}

    def forward(
        self, *args: Any, condition: Condition | None = None, task_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """One pass of the backbone, under the weights that `condition.support` chooses where there is one."""
        support = (condition or self._given).support
        with self.under(self._condition(condition, task_ids)):
            if not self.channel.enabled:
                return self._under(
                    self._rollback.pristine() if self._rollback.depth else {}, self.backbone, args, kwargs
                )
            weights = {} if support is None else self.weights_for(self.routing(support))
            return self._under(weights, self.backbone, args, kwargs)

    def features(self, inputs: Any, weights: Mapping[str, Tensor] | None = None) -> Float[Tensor, "items width"]:
        """Features of a batch of inputs, under the weights as they stand or with some of them replaced."""
        return self._under(weights or {}, FeatureExtractor(self.backbone, self.feature_kind), (inputs,), {})

    def settled_features(
        self, inputs: Inputs, weights: Mapping[str, Tensor] | None = None, *, batch_size: int | None = None
    ) -> Float[Tensor, "items width"]:
        """`features` in evaluation, without gradients; `batch_size` items at a time where it is given."""
        items, size = count(inputs), batch_size or max(1, count(inputs))
        with eval_mode(self.backbone):
            parts = [self.features(take(inputs, slice(at, at + size)), weights) for at in range(0, items, size)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def frozen_features(self, inputs: Inputs, *, batch_size: int | None = None) -> Float[Tensor, "items width"]:
        """Features under the pretrained weights, in evaluation, without gradients."""
        return self.settled_features(
            inputs, self._rollback.pristine() if self._rollback.depth else None, batch_size=batch_size
        )

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
        routing = support if isinstance(support, Routing) else self.settled_routing(support)
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

    def settled_routing(self, support: SupportSet) -> Routing:
        """`routing` in evaluation: nothing is drawn, no gradients."""
        with eval_mode(self.mixture.router):
            return self.routing(support)

    def train(self, mode: bool = True) -> "EpisodicModel":
        """Router and experts train; the backbone stays in eval mode: no dropout, no running statistics.

        Its layers that checkpoint their gradients do so in training, as they were asked to.
        """
        super().train(mode)
        self.backbone.eval()
        for module in self.backbone.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = mode
        return self

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """As the backbone's, not reentrant unless asked; layers run again under the weights of their own pass."""
        given = checkpoint_options(self.channel, gradient_checkpointing_kwargs)
        condition = given.get("context_fn")

        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            first, again = condition()  # type: ignore[misc]
            return first, _both(again, in_place_of(self.backbone, self._in_force))

        if condition is not None and "context_fn" not in (gradient_checkpointing_kwargs or {}):
            given["context_fn"] = contexts
        self.backbone.gradient_checkpointing_enable(given, **options)  # type: ignore[operator]
        self.train(self.training)

    def remove(self) -> nn.Module:
        """The backbone as it was pretrained, modes and gradients asked for included."""
        while self._rollback.depth:
            self._rollback.undo()
        for module in self._trained:
            module.training = True
        return super().remove()

    def _under(
        self, weights: Mapping[str, Tensor], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A pass of the backbone, or of what holds it as `backbone`, with some of its parameters replaced."""
        before, self._in_force = self._in_force, weights
        try:
            with in_place_of(self.backbone, weights):
                return module(*args, **kwargs)
        finally:
            self._in_force = before

    def _mixed(self) -> Mapping[str, Any]:
        return {self.mixture.site: self.mixture}

    def kept_tensors(self) -> list[Tensor]:
        """Router and experts."""
        return list(self._own())

    def _own(self) -> Iterator[Tensor]:
        for part in (self.mixture.router, self.mixture.experts):
            yield from part.state_dict(keep_vars=True).values()


@contextmanager
def _both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Generator[None]:
    with outer, inner:
        yield
