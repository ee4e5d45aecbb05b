"""What is watched while a layer of neurons trains: numbers that show collapse, and in words what to do about it."""

import math
from collections.abc import Mapping

from torch import nn

from mixwright.evaluation.neuron_usage import UsageMeter

PATIENCE = 20
"""Looks in a row after which what is bad news is no longer merely young."""
DEAD = 0.5
"""The share of sub-keys that nobody retrieved above which there is an alarm."""


class Watch:
    """Looks at a model in training: numbers for the log, and which of them are bad news.

    Over all passes since the look before, means over sites: `retrieval.used`, the share of experts with any gate mass;
    `retrieval.unevenness`, log N less the entropy of that mass, in nats (He 2024, table 2); `retrieval.coverage`, the
    share of the softmax over all experts that was retrieved; `retrieval.dead_keys`, the share of sub-keys that no head
    retrieved. The first look only begins to count.
    """

    def __init__(self, patience: int = PATIENCE) -> None:
        self.patience = patience
        self._meter: UsageMeter | None = None
        self._collapsed = self._dead = 0
        self._slots = 0.0

    def look(self, model: nn.Module) -> dict[str, float]:
        """The numbers since the last look."""
        if self._meter is None:
            self._meter = UsageMeter(model)
            return {}
        found = list(self._meter.usage().values())
        self._meter.clear()
        if not all(one.tokens for one in found):
            return {}
        self._slots = _mean([float(one.counts.sum()) / one.tokens for one in found])
        numbers = {
            "used": _mean([one.used for one in found]),
            "unevenness": _mean([one.unevenness for one in found]),
            "dead_keys": _mean([float(axis.dead.mean()) for one in found for axis in (one.first, one.second)]),
            "experts": _mean([float(len(one.counts)) for one in found]),
        }
        covered = [float(one.coverage.mean()) for one in found if one.coverage is not None]
        if covered:
            numbers["coverage"] = _mean(covered)
        return {f"retrieval.{name}": value for name, value in numbers.items()}

    def alarms(self, numbers: Mapping[str, float]) -> dict[str, str]:
        """Name of each alarm -> what it means and what may help, once it has stood for `patience` looks."""
        if "retrieval.unevenness" not in numbers:
            return {}
        acting = numbers["retrieval.experts"] * math.exp(-numbers["retrieval.unevenness"])
        self._collapsed = self._collapsed + 1 if acting < 2 * self._slots else 0
        self._dead = self._dead + 1 if numbers["retrieval.dead_keys"] > DEAD else 0
        found: dict[str, str] = {}
        if self._collapsed >= self.patience:
            found["collapsed retrieval"] = (
                f"all tokens lean on the same {acting:.0f} experts or so, where each retrieves {self._slots:.0f}; use "
                "query_norm='batch', lower router_learning_rate, or train under model.rebalancing()"
            )
        if self._dead >= self.patience:
            found["dead sub-keys"] = (
                f"{numbers['retrieval.dead_keys']:.0%} of the sub-keys are retrieved by nobody; use "
                "query_norm='batch', train under model.rebalancing(), or model.revive(...) them"
            )
        return found

    def end(self) -> None:
        """Stop counting."""
        if self._meter is not None:
            self._meter.detach()
            self._meter = None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
