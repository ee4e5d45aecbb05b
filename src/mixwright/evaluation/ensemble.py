"""The logit ensemble: every expert alone, and the mean of what they say. It costs as much as running them all, and has
nothing to learn: the least that a model which mixes them inside must beat."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from mixwright.composition.model import ComposedModel


class LogitEnsemble:
    """logits = sum_m w_m logits_m, where m alone acts. Called as the model is; whatever else is asked, it answers."""

    def __init__(self, model: ComposedModel, experts: Sequence[str], weights: Sequence[float] | None = None) -> None:
        self.model = model
        self.experts = tuple(experts)
        self.weights = tuple(weights or [1.0 / len(self.experts)] * len(self.experts))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """An output with the mean `logits`. Raises ValueError for a model that gives none."""
        mixed: Tensor | None = None
        for expert, weight in zip(self.experts, self.weights, strict=True):
            with self.model.only(expert):
                logits = getattr(self.model(*args, **kwargs), "logits", None)
            if logits is None:
                raise ValueError("this backbone gives no logits, so there is nothing for an ensemble to average.")
            term = weight * logits.float()
            mixed = term if mixed is None else mixed + term
        return SimpleNamespace(logits=mixed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)
