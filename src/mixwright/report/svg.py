"""Charts as inline SVG. Widths are percentages, so that a chart fits its column and its text keeps its size."""

from collections.abc import Sequence
from dataclasses import dataclass

from mixwright.report.markup import escape, tag

_ROW, _BAR, _TALL = 26, 18, 38


@dataclass(frozen=True)
class Segment:
    """A part of a bar: its length in the chart's unit, its style class, its label, and what it says when pointed at."""

    length: float
    style: str
    label: str
    title: str


@dataclass(frozen=True)
class Dot:
    """A row of a dot-and-bar chart: a value with an interval (or none)."""

    name: str
    value: float
    low: float | None
    high: float | None
    style: str = ""


def stacked_bars(rows: Sequence[tuple[str, Sequence[Segment]]], full: float, title: str) -> str:
    """One horizontal bar for each row; `full` is the length of a bar that fills the chart."""
    drawn = [_bar(place, name, segments, full) for place, (name, segments) in enumerate(rows)]
    return _chart(len(rows) * _ROW, title, drawn)


def _bar(place: int, name: str, segments: Sequence[Segment], full: float) -> str:
    top, start = place * _ROW, _GUTTER
    parts = [tag("text", escape(name), x="0", y=top + _ROW / 2, class_="axis", dominant_baseline="central")]
    for segment in segments:
        width = (100 - _GUTTER) * segment.length / full if full > 0 else 0.0
        parts.append(
            tag(
                "rect",
                tag("title", escape(segment.title)),
                x=f"{start:.3f}%",
                y=top + (_ROW - _BAR) / 2,
                width=f"{width:.3f}%",
                height=_BAR,
                class_=f"seg {segment.style}",
            )
        )
        if width >= 7:
            middle = f"{start + width / 2:.3f}%"
            parts.append(tag("text", escape(segment.label), x=middle, y=top + _ROW / 2, class_="in"))
        start += width
    return "".join(parts)


def dots(rows: Sequence[Dot], title: str) -> str:
    """A value for each row as a dot, its interval as a bar behind it, on one scale with its ends written beneath."""
    ends = [end for row in rows for end in (row.value, row.low, row.high) if end is not None]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high = low - room, high + room
    drawn = [_dot(place, row, low, high) for place, row in enumerate(rows)]
    bottom = len(rows) * _TALL
    drawn.append(f'<line x1="1%" x2="99%" y1="{bottom}" y2="{bottom}" class="rule"/>')
    drawn += [
        tag("text", f"{value:.4g}", x=f"{x}%", y=bottom + 16, class_=f"axis {anchor}")
        for value, x, anchor in ((low, 1, "start"), ((low + high) / 2, 50, "mid"), (high, 99, "end"))
    ]
    return _chart(bottom + 22, title, drawn)


def _dot(place: int, row: Dot, low: float, high: float) -> str:
    y = place * _TALL + _TALL - 12

    def x(value: float) -> str:
        return f"{1 + 98 * (value - low) / (high - low):.3f}%"

    interval = ""
    if row.low is not None and row.high is not None:
        interval = (
            f'<line x1="{x(row.low)}" x2="{x(row.high)}" y1="{y}" y2="{y}" class="interval {escape(row.style)}"/>'
        )
    spread = "" if row.low is None or row.high is None else f" [{row.low:.4g}, {row.high:.4g}]"
    said = tag("title", escape(f"{row.name}: {row.value:.4g}{spread}"))
    name = tag("text", escape(row.name), x="1%", y=y - 11, class_="name")
    figure = tag("text", f"{row.value:.4g}", x="99%", y=y - 11, class_="name end")
    track = f'<line x1="1%" x2="99%" y1="{y}" y2="{y}" class="rule"/>'
    return (
        name
        + figure
        + track
        + interval
        + tag("circle", said, cx=x(row.value), cy=y, r="5.5", class_=f"dot {row.style}")
    )


def sparkline(values: Sequence[float], most: float, style: str, title: str) -> str:
    """One thin column for each value, on a scale from 0 to `most`."""
    step = 100 / max(len(values), 1)
    columns = [
        tag(
            "rect",
            x=f"{place * step + step * 0.1:.2f}%",
            y=f"{20 - (height := 20 * value / most if most > 0 else 0.0):.2f}",
            width=f"{step * 0.8:.2f}%",
            height=f"{max(height, 0.5):.2f}",
            class_=style,
        )
        for place, value in enumerate(values)
    ]
    return tag("svg", tag("title", escape(title)), *columns, class_="spark", role="img", width="90", height="20")


_GUTTER = 14.0


def _chart(height: float, title: str, drawn: Sequence[str]) -> str:
    return tag(
        "svg", tag("title", escape(title)), *drawn, class_="chart", role="img", width="100%", height=f"{height:g}"
    )
