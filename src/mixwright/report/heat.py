"""A table of numbers as squares: the area says how much, the colour which side of even, so that neither is alone.

Squares of one size and kind are one path of many points, a few bytes each: a page can hold a hundred thousand of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mixwright.report.markup import escape, tag

_CELL, _LABEL, _HEAD = 13, 30, 15
_STEPS = 10
_FEW, _LARGER = 8, 1.5


@dataclass(frozen=True)
class Panel:
    """One table: `caption` above it, each value on a scale where 1 fills its square.

    Values over `even` take the strong colour, others the soft one, negative ones the colour of what is worse. `titles`:
    what each row says when pointed at, or nothing.
    """

    caption: str
    rows: Sequence[Sequence[float]]
    even: float
    titles: Sequence[str] = ()


def rulers(labels: Sequence[str], columns: int) -> str:
    """What every panel of a page has at its edges, written once: a label for each row, a number for each column."""
    rows = (
        tag("text", escape(label), x=_LABEL - 5, y=f"{_HEAD + (place + 0.5) * _CELL:g}", class_="ruled")
        for place, label in enumerate(labels)
    )
    heads = (
        tag("text", str(column), x=f"{_LABEL + (column + 0.5) * _CELL:g}", y=_HEAD - 5, class_="ruled numbered")
        for column in range(columns)
    )
    defined = tag("defs", tag("g", *rows, *heads, id="rulers"))
    return tag("svg", defined, class_="rulers", width=0, height=0, aria_hidden="true")


def heat(panel: Panel) -> str:
    """The panel as an SVG that keeps its proportions where the window is narrower; the page has its `rulers`."""
    columns = max((len(row) for row in panel.rows), default=0)
    scale = _LARGER if max(columns, len(panel.rows)) <= _FEW else 1
    width, height = _LABEL + columns * _CELL, _HEAD + len(panel.rows) * _CELL
    return tag(
        "svg",
        tag("title", escape(panel.caption)),
        tag("use", href="#rulers"),
        tag("g", *_squares(panel), transform=f"translate({_LABEL} {_HEAD}) scale({_CELL})"),
        *(_band(place, title, columns) for place, title in enumerate(panel.titles)),
        class_="heat",
        role="img",
        viewBox=f"0 0 {width} {height}",
        width=f"{width * scale:g}",
        height=f"{height * scale:g}",
    )


def _band(place: int, title: str, columns: int) -> str:
    """Nothing to see: a row that says its numbers when pointed at."""
    top = _HEAD + place * _CELL
    return tag("rect", tag("title", escape(title)), y=top, width=_LABEL + columns * _CELL, height=_CELL, class_="band")


def _squares(panel: Panel) -> list[str]:
    points: dict[str, list[str]] = {}
    for y, row in enumerate(panel.rows):
        for x, value in enumerate(row):
            if step := _step(value):
                side = "m" if value < 0 else "o" if value > panel.even else "u"
                points.setdefault(f"{side} z{step}", []).append(f"M{x} {y}h0")
    columns, rows = max((len(row) for row in panel.rows), default=0), len(panel.rows)
    ground = tag("rect", width=columns, height=rows, class_="ground")
    moved = (tag("path", d="".join(found), class_=kind) for kind, found in sorted(points.items()))
    return [ground, tag("g", *moved, transform="translate(.5 .5)")]


def _step(value: float) -> int:
    """The side of a square whose area is the value, in tenths of its cell; what would not be seen is left out."""
    if value != value:
        return 0
    return min(_STEPS, round(_STEPS * min(1.0, abs(value)) ** 0.5))
