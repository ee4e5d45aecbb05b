"""A backbone whose weights an episode's support set chooses: adapted for one pass, for a while, or for good."""

import fnmatch
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from numbers import Real
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixwright.backbones.eval_mode import eval_mode
from mixwright.backbones.image_settings import reads_images
from mixwright.composition.adaptations import Adaptation, adaptation_in, forget, names_in
from mixwright.composition.checkpointing import checkpoint_options
from mixwright.composition.features import FeatureExtractor, Features
from mixwright.composition.model import ComposedModel, Composition
from mixwright.composition.parameter_mixture import ParameterMixture
from mixwright.composition.probe import Probe
from mixwright.composition.reading import reader_of
from mixwright.composition.rollback import Rollback
from mixwright.composition.route import Route
from mixwright.composition.substitution import in_place_of
from mixwright.composition.support import Given, Labelled, Read, labelled, refuse_whole_pixels, shapes_of
from mixwright.experts.base import AbstractDeltas
from mixwright.ops.prototypes import class_means
from mixwright.ops.rows import Inputs, count, take
from mixwright.routers.base import AbstractRouter
from mixwright.routing import Condition, Routing, SupportSet


class EpisodicModel(ComposedModel):
    """y = backbone(x; theta + sum_e w_e delta_e), w chosen from the features of a support set under the frozen theta.

    With `condition.support` a pass is under the weights of that support set, and gradients reach router and experts;
    without, under the weights as they stand: the pretrained ones, or those of `adapted` and `commit`, which change them
    in place and take them back to the bit. `features`: see `FeatureExtractor`. `reader`: reads raw items, where
    they are not texts or pictures whose reading lies beside the backbone.
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
        self._forbidden: frozenset[str] = frozenset()
        self._cache: dict[str, tuple[tuple[object, ...], dict[str, Tensor]]] = {}
        self.reader: Read | None = None

    def forward(
        self, *args: Any, condition: Condition | None = None, task_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """One pass of the backbone, under the weights that `condition.support` chooses where there is one."""
        support = (condition or self._given).support
        with self.under(self._condition(condition, task_ids)):
            if not self.channel.enabled:
                return self._under(self._overwritten(), self.backbone, args, kwargs)
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

    def pristine(self) -> dict[str, Tensor]:
        """The backbone's parameters as they were pretrained, whatever stands in their place just now."""
        return self._rollback.pristine()

    def _overwritten(self) -> dict[str, Tensor]:
        """The pretrained parameters where something was committed over them; none where they stand as they are."""
        return self._rollback.pristine() if self._rollback.depth else {}

    def frozen_features(self, inputs: Inputs, *, batch_size: int | None = None) -> Float[Tensor, "items width"]:
        """Features under the pretrained weights, in evaluation, without gradients. Raises ValueError for items that the
        backbone can't read."""
        with self._reading(inputs, "items"):
            return self.settled_features(inputs, self._overwritten(), batch_size=batch_size)

    def routing(self, support: SupportSet, features: Float[Tensor, "shots width"] | None = None) -> Routing:
        """How much each expert counts for a support set; `features`: its frozen features, where they are known."""
        known = self.frozen_features(support.inputs) if features is None else features
        return self.mixture.route(known, Condition(support=support))

    def weights_for(self, routing: Routing, strength: float = 1.0) -> dict[str, Tensor]:
        """The parameters of the backbone under a routing: pretrained + strength * (their change).

        Those that are forbidden are left out: they stay as pretrained. Raises ValueError for a routing whose decision
        axes are not the experts' blocks.
        """
        self.mixture.experts.by_block(routing.dense())
        return self._changeable(self.mixture.weights(self._rollback.pristine(), routing, strength))

    def weights_for_each(self, routings: Sequence[Routing], strength: float = 1.0) -> list[dict[str, Tensor]]:
        """`weights_for` under each of several routings, which share what work they can."""
        for routing in routings:
            self.mixture.experts.by_block(routing.dense())
        found = self.mixture.weights_each(self._rollback.pristine(), routings, strength)
        return [self._changeable(weights) for weights in found]

    def _changeable(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in weights.items() if name not in self._forbidden}

    def forbid(self, *patterns: str) -> tuple[str, ...]:
        """No adaptation changes the parameters that these globs name, until the next call; without any, all may change.

        Returns their names. Raises ValueError for a glob that names none.
        """
        names = self.mixture.experts.names
        for pattern in patterns:
            if not isinstance(pattern, str):  # pyright: ignore[reportUnnecessaryIsInstance]  a border
                raise TypeError(f"forbid: {pattern!r}; give globs one by one, such as forbid('*.bias', '*norm*').")
            if not fnmatch.filter(names, pattern):
                raise ValueError(f"{pattern!r} names none of the parameters that may change ({names[0]}, ...).")
        self._forbidden = frozenset(name for pattern in patterns for name in fnmatch.filter(names, pattern))
        return self.forbidden

    @property
    def forbidden(self) -> tuple[str, ...]:
        """The parameters that no adaptation changes, by a person's word; saved with the model."""
        return tuple(name for name in self.mixture.experts.names if name in self._forbidden)

    def freeze_expert(self, expert: str, frozen: bool = True) -> None:
        """Keep an expert through further training as it is, its change wherever it acts; saved with the model.

        Raises ValueError for an expert that is not in the model.
        """
        self.mixture.experts.freeze(self.index(expert), frozen)

    @property
    def frozen_experts(self) -> tuple[str, ...]:
        """The experts that further training leaves as they are."""
        return tuple(name for name, kept in zip(self.experts, self.mixture.experts.frozen.tolist()) if kept)

    def restrain(self, forbidden: Sequence[str], frozen: Sequence[str]) -> None:
        """As the base class says."""
        strange = sorted(set(forbidden) - set(self.mixture.experts.names))
        if strange:
            raise ValueError(f"forbidden: {strange[0]!r} is none of the parameters that may change.")
        places = [self.index(expert) for expert in frozen]
        self._forbidden = frozenset(forbidden)
        for place in places:
            self.mixture.experts.freeze(place)

    @torch.no_grad()
    def commit(self, support: Given | Route | Routing | str, strength: float | None = None) -> Routing:
        """Change the backbone's weights in place, to those for a support set, until `rollback`.

        A route, a routing, or the name of an adaptation that is remembered serve as well. `strength`: from 0, exactly
        the pretrained weights, to 1, the default unless the adaptation was remembered with another.
        """
        routing, weights = self._adaptation(support, strength)
        self._rollback.seal()
        self._rollback.apply(weights)
        return routing

    def rollback(self) -> None:
        """Take back the last `commit`, to the bit. Raises ValueError where nothing was committed."""
        self._rollback.undo()

    @property
    def depth(self) -> int:
        """Commits that stand."""
        return self._rollback.depth

    def is_pristine(self) -> bool:
        """Whether every byte of the backbone is as it was before the first commit, or the first call of this."""
        return self._rollback.is_pristine()

    @contextmanager
    def adapted(self, support: Given | Route | Routing | str, strength: float | None = None) -> Generator[Routing]:
        """Inside the block the backbone's weights are those for a support set; then they are what they were.

        What is given is as for `commit`. Blocks nest; commits made inside are taken back too.
        """
        routing = self.commit(support, strength)
        depth = self._rollback.depth
        try:
            yield routing
        finally:
            while self._rollback.depth >= depth:
                self._rollback.undo()

    def labelled(self, support: Given) -> Labelled:
        """A support set in any form, checked, as `Labelled`: raises as `composition.support.labelled` does."""
        return labelled(support, next(self.backbone.parameters()), self.read)

    def read(self, items: Any) -> Inputs:
        """Raw items as the backbone reads them, by `reader` or by what lies beside it. Raises TypeError."""
        return (self.reader or reader_of(self, items))(items)

    def support_features(self, support: SupportSet) -> Float[Tensor, "shots width"]:
        """`frozen_features` of a support set. Raises ValueError where the backbone can't read its items."""
        return self.checked_features(support.inputs, self._overwritten(), what="support")

    def checked_features(
        self,
        inputs: Inputs,
        weights: Mapping[str, Tensor] | None = None,
        *,
        what: str = "query",
        batch_size: int | None = None,
    ) -> Float[Tensor, "items width"]:
        """`settled_features`. Raises ValueError for no items, for items the backbone can't read, and for NaN."""
        if not count(inputs):
            raise ValueError(f"{what}: empty; expected one item or more.")
        if reads_images(self.backbone) is True:
            refuse_whole_pixels(inputs, what)
        with self._reading(inputs, what):
            features = self.settled_features(inputs, weights, batch_size=batch_size)
        bad = (~features.isfinite()).any(1).nonzero()
        if len(bad):
            raise ValueError(f"{what}: the backbone's features of item {int(bad[0])} are not finite.")
        return features

    @contextmanager
    def _reading(self, inputs: Inputs, what: str) -> Generator[None]:
        """What goes wrong in a pass over `inputs` becomes one ValueError that says what came."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"{what}: the backbone, a {type(self.backbone).__name__}, cannot read items of {shapes_of(inputs)} "
                f"({reason}); bring them to its size."
            ) from error

    def settled_routing(self, support: Given) -> Routing:
        """`routing` in evaluation: nothing is drawn, no gradients. Raises ValueError for a support with a fault."""
        known = self.labelled(support).support
        with eval_mode(self.mixture.router):
            return self.routing(known, self.support_features(known))

    def remember(
        self, name: str, support: Given, strength: float = 1.0, *, temperature: float = 1.0, cached: bool = False
    ) -> Adaptation:
        """Keep an adaptation under a name: its mixture, and the prototypes of its classes under it; saved as well.

        `cached`: its weights are kept in memory, so that switching to it is copying; until the experts change.
        """
        known = self.labelled(support)
        routing = self.settled_routing(known.support)
        weights = self._adaptation(routing, strength)[1]
        features = self.settled_features(known.support.inputs, weights)
        prototypes = class_means(features.float(), known.support.labels, len(known.classes))
        found = Adaptation(routing.dense(), prototypes, known.classes, strength, temperature)
        self.keep(name, found)
        if cached:
            self._cache[name] = self._stamp(), weights
        return found

    def keep(self, name: str, adaptation: Adaptation) -> None:
        """Keep an adaptation under a name, in place of what was there."""
        self.whole.update(adaptation.tensors(name))
        self._cache.pop(name, None)

    def remembered(self, name: str) -> Adaptation:
        """The adaptation of that name. Raises ValueError where there is none."""
        return adaptation_in(self.whole, name)

    @property
    def adaptations(self) -> tuple[str, ...]:
        """The names that are remembered."""
        return names_in(self.whole)

    def forget(self, name: str) -> None:
        """Take a remembered adaptation out. Raises ValueError where there is none."""
        forget(self.whole, name)
        self._cache.pop(name, None)

    def train(self, mode: bool = True) -> Self:
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

    @torch.no_grad()
    def _adaptation(
        self, given: Given | Route | Routing | str, strength: float | None
    ) -> tuple[Routing, dict[str, Tensor]]:
        """The routing and the weights of whatever says which."""
        if isinstance(given, str):
            kept = self.remembered(given)
            routing = Routing(kept.weights.to(next(self.backbone.parameters()).device), len(self.experts))
            strength = kept.strength if strength is None else strength
            stamp, weights = self._cache.get(given, (None, {}))
            if stamp == self._stamp() and strength == kept.strength:
                return routing, weights
        else:
            routing = given.routing if isinstance(given, Route) else given
            if not isinstance(routing, Routing):
                routing = self.settled_routing(routing)
        strength = 1.0 if strength is None else strength
        if not isinstance(strength, Real) or not 0 <= strength <= 1:  # pyright: ignore[reportUnnecessaryIsInstance]  a border
            raise ValueError(f"strength {strength!r}: expected 0 (the pretrained model) to 1.")
        strength = float(strength)
        with eval_mode(self.mixture.experts):
            return routing, self.weights_for(routing, strength)

    def _stamp(self) -> tuple[object, ...]:
        """Changes when the experts do, or what is forbidden."""
        return self._forbidden, *((id(t), t._version) for t in self.mixture.experts.state_dict(keep_vars=True).values())

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
