from typing import Any

import pytest

from mixwright.catalog.card import ExpertCard, SiteCard, Source
from mixwright.catalog.curate import judge, measured, rank, redundant


def card(expert: str, **quality: Any) -> ExpertCard:
    site = SiteCard(d_in=8, d_out=8, rank=1, scale=1.0)
    return ExpertCard(
        id=expert, backbone=None, base_model=None, sites={"q": site}, rank=1, alpha=1.0, targets=("q",), dtype="F32",
        source=Source(kind="trained", name=expert), quality=quality, added="2026-01-01T00:00:00Z", files={},
    )  # fmt: skip


def gain(value: float, width: float = 0.1) -> dict[str, float]:
    return {"value": value, "low": value - width, "high": value + width}


def test_ranking_is_by_gain_and_stable() -> None:
    cards = [card("c"), card("b", gain=gain(0.2)), card("a", gain=gain(0.5)), card("d", gain={"value": 0.2})]
    assert rank(cards) == ("a", "b", "d", "c")


@pytest.mark.parametrize(
    ("quality", "verdict"),
    [
        ({"gain": gain(0.5)}, "keep"),
        ({"gain": gain(0.05)}, "keep"),
        ({"gain": gain(-0.5)}, "useless"),
        ({"gain": gain(0.5), "harm": gain(0.4)}, "harmful"),
        ({"gain": gain(0.5), "harm": gain(0.1)}, "keep"),  # the interval allows harmless
        ({}, "unmeasured"),
        ({"gain": "much"}, "unmeasured"),
        ({"gain": {"value": None}, "redundancy": 3}, "unmeasured"),
    ],
)
def test_verdicts(quality: dict[str, Any], verdict: str) -> None:
    assert judge([card("a", **quality)])[0].verdict == verdict


def test_of_two_alike_the_better_stays() -> None:
    cards = [
        card("a", gain=gain(0.1), redundancy={"experts": {"b": {"update": 0.99}, "c": {"update": 0.2}}}),
        card("b", gain=gain(0.3)),
        card("c"),
    ]
    assert redundant(cards) == {"a": "b"}
    assert [one.verdict for one in judge(cards)] == ["redundant", "keep", "unmeasured"]
    assert measured(cards[0], "gain") == (0.1, 0.0, 0.2)
