"""Why a hybrid is as it is, in nats: what each weight is worth, each component, and the model beside simpler ones.

One `Meter` measures them all on the same documents, so that every difference is paired, and remembers what it has
measured: with two components, a weight of 0 for one is a weight of 1 for the other.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mixwright.backbones.eval_mode import eval_mode
from mixwright.composition.model import ComposedModel
from mixwright.evaluation.ensemble import LogitEnsemble
from mixwright.evaluation.hybrid_documents import Documents, change, losses, per_token
from mixwright.evaluation.hybrid_rows import fixed, forced, left_out, slots_of_rows
from mixwright.evaluation.intervals import Interval

HYBRID, ENSEMBLE, UNIFORM = "hybrid", "logit ensemble", "uniform weights"


def alone(component: str) -> str:
    """How a component by itself is called among the systems."""
    return f"{component} (component)" if component in (HYBRID, ENSEMBLE, UNIFORM) else component


@dataclass(frozen=True, kw_only=True)
class Counterfactual:
    """What forcing one weight does. `forced`: `0`, `1` or `uniform`, 1/M. `change`: nats per token, paired; above 0 the
    model got worse. `kept`: whether the weight had this value already."""

    row: str
    component: str
    forced: str
    weight: float
    loss: float
    change: Interval
    kept: bool = False


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """What leaving a component out everywhere does; the others share its weight as they did among themselves."""

    component: str
    loss: float
    change: Interval


@dataclass
class Meter:
    """Losses of one model on one set of documents, in every guise that was asked for."""

    model: ComposedModel
    documents: Documents
    progress: Callable[[str], None] | None = None
    _known: dict[tuple[Any, ...], Tensor] = field(default_factory=dict[tuple[Any, ...], Tensor])

    @property
    def tokens(self) -> Tensor:
        """Predicted tokens, (documents, places)."""
        return self.documents.tokens

    def sums(
        self, key: tuple[Any, ...], guise: AbstractContextManager[Any] | None = None, speaker: Any = None
    ) -> Tensor:
        """Losses (documents, places) of the model in this guise, or of another speaker; measured once for each key."""
        if key not in self._known:
            if self.progress is not None:
                self.progress(" ".join(map(str, key)))
            with eval_mode(self.model), guise or self.model.replaced():
                self._known[key] = losses(speaker or self.model, self.documents)
        return self._known[key]

    def hybrid(self) -> Tensor:
        """Of the model as it is."""
        return self.sums(("hybrid",))

    def alone(self, component: str) -> Tensor:
        """Of one component by itself."""
        return self.sums(("alone", component), self.model.only(component))

    def ensemble(self) -> Tensor:
        """Of the mean of the components' logits, in equal parts."""
        return self.sums(("ensemble",), None, LogitEnsemble(self.model, self.model.experts))

    def uniform(self) -> Tensor:
        """Of the model with equal weights in every row."""
        count = len(self.model.experts)
        even = self.tokens.new_full((count,), 1.0 / count)
        return self.sums(("uniform",), fixed(self.model, dict.fromkeys(slots_of_rows(self.model), even)))

    def forced(self, row: str, component: int, value: float) -> Tensor:
        """Of the model with one weight forced."""
        if len(self.model.experts) == 2 and component == 1:
            component, value = 0, 1.0 - value
        return self.sums(("weight", row, component, round(value, 6)), forced(self.model, row, component, value))

    def loss(self, sums: Tensor) -> float:
        """Nats per token."""
        return per_token(sums, self.tokens)

    def against(self, sums: Tensor, reference: Tensor) -> Interval:
        """Nats per token more than the reference has."""
        return change(sums, reference, self.tokens)

    def systems(self) -> dict[str, Tensor]:
        """The hybrid, each component alone and, where there are several, their logit ensemble and uniform weights."""
        found = {HYBRID: self.hybrid(), **{alone(name): self.alone(name) for name in self.model.experts}}
        if len(self.model.experts) > 1:
            found |= {ENSEMBLE: self.ensemble(), UNIFORM: self.uniform()}
        return found


def counterfactuals(meter: Meter, weights: dict[str, tuple[float, ...]]) -> list[Counterfactual]:
    """Every weight of every row forced to 0, to 1 and to 1/M; `weights`: row -> what they are. Empty for one component.

    Of a weight that is 0 or 1 already, that part is what the model is, with a change of exactly 0.
    """
    names = meter.model.experts
    if len(names) < 2:
        return []
    values = (("0", 0.0), ("1", 1.0), ("uniform", 1.0 / len(names)))
    found: list[Counterfactual] = []
    for row, own in weights.items():
        for m, component in enumerate(names):
            for word, value in values:
                kept = abs(own[m] - value) < 1e-9
                sums = meter.hybrid() if kept else meter.forced(row, m, value)
                gap = meter.against(sums, meter.hybrid())
                found.append(
                    Counterfactual(
                        row=row, component=component, forced=word, weight=own[m], loss=meter.loss(sums), change=gap,
                        kept=kept,
                    )
                )  # fmt: skip
    return found


def leave_one_out(meter: Meter) -> list[LeftOut]:
    """Each component left out of every row at once; empty where there is one only."""
    names = meter.model.experts
    found: list[LeftOut] = []
    for m, component in enumerate(names if len(names) > 1 else ()):
        sums = meter.sums(("without", component), left_out(meter.model, m))
        found.append(LeftOut(component=component, loss=meter.loss(sums), change=meter.against(sums, meter.hybrid())))
    return found
