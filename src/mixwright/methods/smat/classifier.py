"""A few-shot classifier in the manner of scikit-learn: fitted on some labelled items, asked about others."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from numbers import Integral, Real
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from mixwright.composition.adaptations import Adaptation
from mixwright.composition.episodic import EpisodicModel
from mixwright.composition.support import Given, labelled, placed
from mixwright.data.episodes import Episode
from mixwright.evaluation.calibration import HeldOut, leave_one_out
from mixwright.ops.prototypes import Centre, centres, cosine_scores
from mixwright.ops.rows import take
from mixwright.routing import Routing, SupportSet
from mixwright.training.support_tuning import RATES, STEPS, Diverged, Tuned, Tuning, folds, tune

NONE_OF_THESE = "none of these"
_DEFAULT_FOLDS = 3


class FewShotClassifier:
    """Cosines to the prototypes of a support set, under the weights that it chooses; the model itself stays as it is.

    `adaptation`: `direct`, without a gradient step; or from there `full`, `lora` or `layernorm`, `steps` times at
    `rate` (None: chosen among `rates` on the support alone, by `folds` parts held out in turn). `prototypes`: the
    `mean` of a class, or the `median`, where labels may be wrong. `temperature`: what cosines are divided by; None:
    fitted on support items that were held out. `augment`: vary images in gradient steps.

    After `fit`: `classes_`, `rate_`, `temperature_`, `route_` (the experts' weights), `held_out_` (on what it judges
    itself). `close`, a new `fit`, or the end of a `with` block lets go of the adapted weights.
    """

    _estimator_type = "classifier"

    def __init__(
        self,
        model: EpisodicModel,
        *,
        adaptation: Literal["direct"] | Tuned = "direct",
        strength: float = 1.0,
        prototypes: Centre = "mean",
        temperature: float | None = None,
        rate: float | None = None,
        rates: Sequence[float] = RATES,
        steps: int = STEPS,
        folds: int = _DEFAULT_FOLDS,
        augment: bool = False,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.adaptation: Literal["direct"] | Tuned = adaptation
        self.strength = strength
        self.prototypes: Centre = prototypes
        self.temperature = temperature
        self.rate = rate
        self.rates = rates
        self.steps = steps
        self.folds = folds
        self.augment = augment
        self.batch_size = batch_size
        self.seed = seed

    def fit(self, inputs: Any, labels: Any = None) -> Self:
        """Adapt to labelled items: inputs and labels (numbers or names, any), or one support set or episode.

        Raises ValueError or TypeError naming what is wrong with the items, or with a setting.
        """
        self._check()
        self.close()
        given, classes = _support(inputs, labels)
        support = labelled(given, self._like, self.model.read).support
        ways = len(classes)
        routing = self.model.settled_routing(support)
        with torch.no_grad():
            weights = self.model.weights_for(routing, float(self.strength))
        rate, held = self._chosen_rate(support, weights, ways)
        weights = self._adapted(support, weights, rate)
        features = self._features(support.inputs, weights)
        if held is None:
            held = leave_one_out(features, support.labels, ways, self.prototypes)
        self._keep(routing, weights, centres(features, support.labels, ways, self.prototypes), classes, held)
        self.rate_ = rate
        return self

    def decision_function(self, inputs: Any) -> np.ndarray:
        """Cosines to each class's prototype, (items, classes)."""
        return self._cosines(inputs).numpy()

    def predict_proba(self, inputs: Any) -> np.ndarray:
        """Calibrated probabilities, (items, classes), as `classes_` orders them."""
        return (self._cosines(inputs) / self.temperature_).softmax(-1).numpy()

    def predict(
        self,
        inputs: Any,
        *,
        abstain: float | None = None,
        max_error: float | None = None,
        none_of_these: float | None = None,
    ) -> np.ndarray:
        """The class of each item; with one of the options an array of objects.

        `abstain`: None in place of answers less sure than this. `max_error`: likewise, at the threshold that keeps
        wrong answers to this share of all questions on average, as the support tells (too small a support: no answers).
        `none_of_these`: "none of these" for items farther from every prototype than all but this share of the
        support's own items are from theirs, each seen from the others.
        """
        for name, value in (("abstain", abstain), ("max_error", max_error), ("none_of_these", none_of_these)):
            if value is not None and (not isinstance(value, Real) or not 0 <= value <= 1):  # pyright: ignore[reportUnnecessaryIsInstance]  a border
                raise ValueError(f"{name}={value!r}: expected a share, 0 to 1.")
        cosines = self._cosines(inputs)
        sure, chosen = (cosines / self.temperature_).softmax(-1).max(-1)
        found = self.classes_[chosen.numpy()]
        if abstain is None and max_error is None and none_of_these is None:
            return found
        found = found.astype(object)
        least = 0.0 if abstain is None else float(abstain)
        if max_error is not None:
            least = max(least, self.held_out_.threshold(1 / self.temperature_, float(max_error)))
        found[(sure < least).numpy()] = None
        if none_of_these is not None:
            found[(cosines.max(-1).values < self.held_out_.nearness(float(none_of_these))).numpy()] = NONE_OF_THESE
        return found

    def score(self, inputs: Any, labels: Any) -> float:
        """The share of items that are recognised."""
        return float(np.mean(self.predict(inputs) == _array(labels)))

    @property
    def support_error(self) -> float:
        """1 - the accuracy on support items, each classified without having been seen; NaN where none can be spared."""
        return 1 - self.held_out_.accuracy()

    def remember(self, name: str) -> Adaptation:
        """Leave this classifier in its model under a name, to be saved with it; see `from_model`.

        Raises ValueError unless `adaptation` is direct: tuned weights are no mixture of experts; export those.
        """
        self._fitted()
        if self.adaptation != "direct":
            raise ValueError(
                f"a classifier adapted by {self.adaptation!r} is no mixture of experts; only direct is kept."
            )
        kept = Adaptation(
            self.route_.dense(),
            self._prototypes,
            tuple(map(str, self.classes_.tolist())),
            float(self.strength),
            self.temperature_,
            self.held_out_.cosines,
            self.held_out_.labels,
        )
        self.model.keep(name, kept)
        return kept

    @classmethod
    def from_model(cls, model: EpisodicModel, name: str, **settings: Any) -> Self:
        """The classifier that was remembered under `name`, fitted; its classes are names."""
        kept = model.remembered(name)
        found = cls(model, strength=kept.strength, temperature=kept.temperature, **settings)
        routing = Routing(kept.weights.to(found._like.device), len(model.experts))
        with torch.no_grad():
            weights = model.weights_for(routing, kept.strength)
        held = HeldOut(kept.held_out, kept.held_out_labels)
        found._keep(routing, weights, kept.prototypes.to(found._like.device), np.array(kept.classes), held)
        found.rate_ = 0.0
        return found

    def weights(self) -> Mapping[str, Tensor]:
        """The adapted weights by name; what is not there is as pretrained."""
        self._fitted()
        return dict(self._weights)

    def close(self) -> None:
        """Let go of the adapted weights; it is then as before `fit`."""
        for name in [name for name in vars(self) if name.endswith("_") and not name.startswith("_")]:
            delattr(self, name)
        self._weights: dict[str, Tensor] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The settings by name."""
        del deep
        return {name: getattr(self, name) for name in signature(type(self)).parameters}

    def set_params(self, **settings: Any) -> Self:
        """Change settings. Raises ValueError for a name that is none."""
        known = self.get_params()
        for name, value in settings.items():
            if name not in known:
                raise ValueError(f"no setting {name!r}; there are {', '.join(known)}.")
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.get_params().items() if name != "model")
        return f"{type(self).__name__}({type(getattr(self.model, 'backbone', self.model)).__name__}, {shown})"

    def __sklearn_clone__(self) -> Self:
        """A copy that is not fitted, on the same model."""
        return type(self)(**self.get_params())

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "classes_")

    def __sklearn_tags__(self) -> Any:
        known: Any = sys.modules["sklearn.utils"]  # nobody else calls this
        return known.Tags(
            estimator_type="classifier",
            target_tags=known.TargetTags(required=True),
            classifier_tags=known.ClassifierTags(),
            input_tags=known.InputTags(two_d_array=False),
        )

    @property
    def _like(self) -> Tensor:
        return next(self.model.backbone.parameters())

    def _check(self) -> None:
        if not isinstance(self.model, EpisodicModel):  # pyright: ignore[reportUnnecessaryIsInstance]  a border
            raise TypeError(
                f"model: a {type(self.model).__name__}; expected what mw.compose('smat', ...) or mw.load gives."
            )
        for name, least in (("steps", 0), ("batch_size", 1), ("folds", 2)):
            value: object = getattr(self, name)
            if not isinstance(value, Integral) or value < least:
                raise ValueError(f"{name}={value!r}: expected a whole number, {least} or more.")
        for rate in (*self.rates, *(() if self.rate is None else (self.rate,))):
            if not 0 <= rate < float("inf"):
                raise ValueError(f"rate {rate}: expected a finite number, 0 or more.")
        if self.adaptation not in ("direct", "full", "lora", "layernorm"):
            raise ValueError(f"adaptation={self.adaptation!r}: expected direct, full, lora or layernorm.")
        if self.prototypes not in ("mean", "median"):
            raise ValueError(f"prototypes={self.prototypes!r}: expected mean or median.")
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength={self.strength}: expected 0 to 1.")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: expected a number over 0.")
        if self.rate is None and not self.rates:
            raise ValueError("rates: none to choose from; give one or more, or a rate.")

    def _fitted(self) -> None:
        if not hasattr(self, "classes_"):
            raise ValueError("this classifier is not fitted; call fit(inputs, labels) first.")

    def _keep(
        self, routing: Routing, weights: dict[str, Tensor], prototypes: Tensor, classes: np.ndarray, held: HeldOut
    ) -> None:
        self._weights, self._prototypes = weights, prototypes
        self.route_, self.classes_ = routing, classes
        self.held_out_ = HeldOut(held.cosines.cpu(), held.labels.cpu())
        self.temperature_ = 1 / self.held_out_.scale() if self.temperature is None else float(self.temperature)

    def _chosen_rate(self, support: SupportSet, weights: dict[str, Tensor], ways: int) -> tuple[float, HeldOut | None]:
        """The rate of the gradient steps, and how items were classified that took no part in them.

        The most accurate on the parts held out, of these the one with the least loss; 0 where every class has one item.
        """
        if self.adaptation == "direct":
            return 0.0, None
        parts = folds(support.labels, self.folds, self.seed)
        if not parts:
            return (0.0 if self.rate is None else float(self.rate)), None
        rates = self.rates if self.rate is None else (self.rate,)
        tried = {float(rate): self._held_out(support, weights, ways, parts, float(rate)) for rate in rates}
        best = min(tried, key=lambda rate: (-tried[rate].accuracy(), tried[rate].loss(), rate))
        if not tried[best].is_finite():
            raise ValueError(f"no rate of {', '.join(f'{rate:g}' for rate in tried)} led to finite features.")
        return best, tried[best]

    def _held_out(
        self, support: SupportSet, weights: dict[str, Tensor], ways: int, parts: Sequence[Tensor], rate: float
    ) -> HeldOut:
        found: list[HeldOut] = []
        for part in parts:
            kept = torch.ones(len(support.labels), dtype=torch.bool)
            kept[part] = False
            rest = SupportSet(
                take(support.inputs, kept.nonzero()[:, 0]), support.labels[kept.to(support.labels.device)]
            )
            try:
                tuned = self._adapted(rest, weights, rate)
            except Diverged:
                if self.rate is not None:
                    raise
                return HeldOut(torch.full((len(part), ways), torch.nan), support.labels.cpu()[part])
            prototypes = centres(self._features(rest.inputs, tuned), rest.labels, ways, self.prototypes)
            cosines = cosine_scores(self._features(take(support.inputs, part), tuned), prototypes, 1.0)
            found.append(HeldOut(cosines.cpu(), support.labels.cpu()[part]))
        return HeldOut(torch.cat([one.cosines for one in found]), torch.cat([one.labels for one in found]))

    def _adapted(self, support: SupportSet, weights: dict[str, Tensor], rate: float) -> dict[str, Tensor]:
        if self.adaptation == "direct":
            return weights
        tuning = Tuning(
            kind=self.adaptation,
            rate=rate,
            steps=self.steps,
            augment=self.augment,
            centre=self.prototypes,
            seed=self.seed,
        )
        return tune(self.model, support, weights, tuning)

    def _features(self, inputs: Any, weights: Mapping[str, Tensor]) -> Tensor:
        return self.model.settled_features(inputs, weights, batch_size=self.batch_size).float()

    def _cosines(self, inputs: Any) -> Tensor:
        self._fitted()
        read = placed(inputs, self._like, self.model.read)
        features = self.model.checked_features(read, self._weights, batch_size=self.batch_size).float()
        return cosine_scores(features, self._prototypes, 1.0).cpu()


def rate_by_labelled_test_episodes(classifier: FewShotClassifier, episodes: Iterable[Episode]) -> float:
    """The rate that does best on the query labels of these episodes: the convention of P>M>F and of the paper.

    It looks at test labels (the paper: five episodes of each test domain), which nobody has who needs the classifier.
    Report it beside the choice by the support alone, and name it as what it is.
    """
    known = list(episodes)
    accuracy = {float(rate): 0.0 for rate in classifier.rates}
    for rate in accuracy:
        for episode in known:
            with classifier.__sklearn_clone__().set_params(rate=rate) as tried:
                try:
                    tried.fit(episode)
                    accuracy[rate] += tried.score(episode.query, _by_class(episode, tried))
                except Diverged:
                    accuracy[rate] = -1.0
                    break
    return max(accuracy, key=lambda rate: (accuracy[rate], -rate))


def _by_class(episode: Episode, fitted: FewShotClassifier) -> np.ndarray:
    if episode.query_labels is None:
        raise ValueError(f"{episode.where[0]}: its queries have no labels to choose a rate by.")
    return fitted.classes_[episode.query_labels.cpu().numpy()]


def _support(inputs: Any, labels: Any) -> tuple[Given, np.ndarray]:
    """The support with labels 0, 1, ..., and the classes that these stand for, sorted."""
    if labels is None:
        if isinstance(inputs, tuple) and len(inputs) == 2:
            return _support(*inputs)
        if isinstance(inputs, Episode):
            names = inputs.meta.get("classes", ())
            classes = names if len(names) == inputs.ways else range(inputs.ways)
            return inputs, np.array(list(classes))
        if isinstance(inputs, SupportSet):
            ways = int(inputs.labels.max()) + 1 if len(inputs.labels) else 0
            return inputs, np.arange(ways)
        raise TypeError("fit takes inputs and labels, a SupportSet, or an Episode.")
    given = _array(labels)
    if given.ndim != 1:
        raise ValueError(f"labels: of shape {given.shape}; expected one for each item.")
    if given.dtype.kind == "f" and len(given) and not np.all(given == np.round(given)):
        raise ValueError("labels: fractions; expected class numbers or names.")
    classes, places = np.unique(given, return_inverse=True)
    return (inputs, torch.from_numpy(places.reshape(-1).astype(np.int64))), classes


def _array(labels: Any) -> np.ndarray:
    found = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    missing = [place for place, label in enumerate(found) if label is None] if found.ndim == 1 else []
    if missing:
        raise ValueError(f"labels: none for item {missing[0]}; label it, or leave it out.")
    return found.astype(str) if found.dtype == object else found
