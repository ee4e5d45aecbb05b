"""Line charts as inline SVG: what moves in training, and the ground around a choice.

Lines are drawn in a box that stretches with the column while text and dots keep their size. Every line ends in its
label: colour alone is never the only sign.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mixwright.report.markup import escape, tag

_LEFT, _WIDE, _TOP, _TALL = 13.0, 78.0, 8.0, 120.0
_LEAST_GAP = 13.0

Place = Callable[[float, float], tuple[float, float]]
"""From a value to percent of the box."""


@dataclass(frozen=True)
class Line:
    """One line: `style` is its class, `label` stands at its end, `low` and `high` are the band behind it."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: str
    label: str
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Mark:
    """A point that is pointed out, with what it says."""

    x: float
    y: float
    style: str
    said: str


def line_chart(
    lines: Sequence[Line], title: str, *, x_name: str, y_range: tuple[float, float] | None = None,
    marks: Sequence[Mark] = (),
) -> str:  # fmt: skip
    """The chart, on a scale that holds every line, band and mark unless `y_range` is given; x runs over the lines'."""
    xs = [x for line in lines for x in line.xs] + [mark.x for mark in marks]
    ys = [y for line in lines for part in (line.ys, line.low or (), line.high or ()) for y in part]
    left, right = min(xs, default=0.0), max(xs, default=1.0)
    low, high = y_range or _roomy(min([*ys, *(m.y for m in marks)]), max([*ys, *(m.y for m in marks)]))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / (right - left) if right > left else 0.5
        return 100 * across, 100 * (high - y) / (high - low)

    drawn = [_drawn(line, place) for line in lines]
    stretched = tag(
        "svg", *drawn, x=f"{_LEFT}%", y=f"{_TOP:g}", width=f"{_WIDE}%", height=f"{_TALL:g}", viewBox="0 0 100 100",
        preserveAspectRatio="none", overflow="visible",
    )  # fmt: skip
    return tag(
        "svg",
        tag("title", escape(title)),
        *_axes(low, high, left, right, x_name),
        stretched,
        *_ends(lines, place),
        *(_mark(mark, place) for mark in marks),
        class_="chart curves",
        role="img",
        width="100%",
        height=f"{_TOP + _TALL + 34:g}",
    )


def _roomy(low: float, high: float) -> tuple[float, float]:
    room = (high - low) * 0.08 or abs(high) * 0.05 or 0.5
    return low - room, high + room


def _drawn(line: Line, place: Place) -> str:
    points = [place(x, y) for x, y in zip(line.xs, line.ys, strict=True)]
    band = ""
    if line.low is not None and line.high is not None and any(a != b for a, b in zip(line.low, line.high)):
        above = [place(x, y) for x, y in zip(line.xs, line.high, strict=True)]
        below = [place(x, y) for x, y in zip(line.xs, line.low, strict=True)]
        band = tag("polygon", points=_points([*above, *reversed(below)]), class_=f"band {line.style}")
    return band + tag(
        "polyline", tag("title", escape(line.name)), points=_points(points), class_=f"line {line.style}",
        vector_effect="non-scaling-stroke",
    )  # fmt: skip


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.4g},{y:.4g}" for x, y in points)


def _axes(low: float, high: float, left: float, right: float, x_name: str) -> list[str]:
    bottom = _TOP + _TALL
    rules = [
        f'<line x1="{_LEFT}%" x2="{_LEFT + _WIDE}%" y1="{y:g}" y2="{y:g}" class="rule"/>'
        for y in (_TOP, _TOP + _TALL / 2, bottom)
    ]
    levels = zip((high, (low + high) / 2, low), (_TOP, _TOP + _TALL / 2, bottom))
    digits = 2 if high - low > 0.2 else 3 if high - low > 0.02 else 4
    upright = [
        tag("text", f"{value:.{digits}f}", x=f"{_LEFT - 1.5}%", y=f"{y + 4:g}", class_="axis end")
        for value, y in levels
    ]
    flat = [
        tag("text", f"{value:g}", x=f"{x}%", y=f"{bottom + 15:g}", class_=f"axis {anchor}")
        for value, x, anchor in ((left, _LEFT, "start"), (right, _LEFT + _WIDE, "end"))
    ]
    name = tag("text", escape(x_name), x=f"{_LEFT + _WIDE / 2}%", y=f"{bottom + 15:g}", class_="axis mid")
    return [*rules, *upright, *flat, name]


def _ends(lines: Sequence[Line], place: Place) -> list[str]:
    """The label of each line at its end, moved apart where they would lie on each other."""
    ends = [(place(line.xs[-1], line.ys[-1])[1], line) for line in lines if line.xs and line.label]
    said: list[str] = []
    before = -_LEAST_GAP
    for high, line in sorted(ends, key=lambda end: end[0]):
        y = max(_TOP + _TALL * high / 100, before + _LEAST_GAP)
        before = y
        said.append(
            tag("text", escape(line.label), x=f"{_LEFT + _WIDE + 1}%", y=f"{y + 4:g}", class_=f"at {line.style}")
        )
    return said


def _mark(mark: Mark, place: Place) -> str:
    x, y = place(mark.x, mark.y)
    return tag(
        "circle", tag("title", escape(mark.said)), cx=f"{_LEFT + _WIDE * x / 100:.4g}%",
        cy=f"{_TOP + _TALL * y / 100:.4g}", r="5", class_=f"dot {mark.style}",
    )  # fmt: skip
