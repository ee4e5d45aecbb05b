"""Which experts deserve their place: verdicts, ranking and redundancy, from what their cards say. Pure; needs no torch.

A card's `quality` is what evaluation measured: `gain` and `harm` as {"value", "low", "high"} in nats per token (gain
above 0 is good, harm above 0 is bad), and `redundancy` as {"experts": {other expert: {"update": cosine}}}.
The verdicts here are on the pool as it is now, which changes with every expert that comes or goes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from mixwright.catalog.card import ExpertCard

Verdict = Literal["keep", "unmeasured", "useless", "harmful", "redundant"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Where a verdict changes."""

    harm: float = 0.05
    """Nats per token that an expert may cost on general text."""
    cosine: float = 0.9
    """Two updates above this cosine are one expert twice."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A verdict on one expert, and why."""

    expert: str
    verdict: Verdict
    reason: str


def measured(card: ExpertCard, name: str) -> tuple[float, float, float] | None:
    """A measurement on a card as (value, low, high), or None where it was not made."""
    found = [_at(card.quality.get(name), part) for part in ("value", "low", "high")]
    value, low, high = (float(part) if isinstance(part, (int, float)) else None for part in found)
    return None if value is None else (value, value if low is None else low, value if high is None else high)


def rank(cards: Iterable[ExpertCard]) -> tuple[str, ...]:
    """Expert ids by gain, the best first; those without a measurement last, in order of their ids."""

    def key(card: ExpertCard) -> tuple[bool, float, str]:
        gain = measured(card, "gain")
        return gain is None, -gain[0] if gain else 0.0, card.id

    return tuple(card.id for card in sorted(cards, key=key))


def redundant(cards: Sequence[ExpertCard], limit: float = Limits.cosine) -> dict[str, str]:
    """Experts that repeat a better one: each with the one that stays. Of two alike the higher ranked stays."""
    by_id = {card.id: card for card in cards}
    stays: list[str] = []
    repeats: dict[str, str] = {}
    for expert in rank(cards):
        alike = [other for other in stays if _cosine(by_id[expert], by_id[other]) > limit]
        if alike:
            repeats[expert] = max(alike, key=lambda other: _cosine(by_id[expert], by_id[other]))
        else:
            stays.append(expert)
    return repeats


def judge(cards: Sequence[ExpertCard], limits: Limits | None = None) -> tuple[Judgement, ...]:
    """A verdict on every expert, in the order of `cards`. Nothing is changed: a person decides."""
    limits = limits or Limits()
    repeats = redundant(cards, limits.cosine)
    return tuple(_judge(card, repeats.get(card.id), limits) for card in cards)


def _judge(card: ExpertCard, repeated: str | None, limits: Limits) -> Judgement:
    gain, harm = measured(card, "gain"), measured(card, "harm")
    verdict: Verdict = "keep"
    reason = "it helps on its own task" if gain else ""
    if repeated is not None:
        verdict, reason = "redundant", f"its update is that of {repeated}"
    elif harm is not None and harm[1] > limits.harm:
        verdict, reason = "harmful", f"it costs at least {harm[1]:.3f} nats per token on general text"
    elif gain is None:
        verdict, reason = "unmeasured", "no gain over the backbone was measured"
    elif gain[2] <= 0:
        verdict, reason = "useless", f"its gain is at most {gain[2]:.3f} nats per token"
    elif gain[1] <= 0:
        reason = "it seems to help, but its interval holds 0"
    return Judgement(expert=card.id, verdict=verdict, reason=reason)


def _cosine(one: ExpertCard, other: ExpertCard) -> float:
    """The cosine of two updates as either card has it: the one that came later knows the other."""
    for card, name in ((one, other.id), (other, one.id)):
        found = _at(_at(_at(_at(card.quality, "redundancy"), "experts"), name), "update")
        if isinstance(found, (int, float)):
            return float(found)
    return 0.0


def _at(value: object, key: str) -> object:
    return cast("Mapping[str, object]", value).get(key) if isinstance(value, Mapping) else None
