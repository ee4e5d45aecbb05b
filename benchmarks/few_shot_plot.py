"""Two plots of the few-shot comparison as one SVG: learning by tasks seen, and gain against forgetting.

python -m benchmarks.few_shot_plot   # from the cells of --cache, to benchmarks/results/few_shot.svg
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cells import Cells
from benchmarks.few_shot_glyphs import IN_DOMAINS, KEPT, OUT_DOMAINS
from benchmarks.few_shot_tables import PRETRAINED, Scores, found, mean

FILE = Path("benchmarks/results/few_shot.svg")
HOME = Path.home() / ".cache/mixwright"
WIDE, HIGH, EDGE = 430.0, 330.0, 48.0
COLOURS = {"P>M>F": "#b5472f", "P>M>F + distillation": "#c99a2e", "SMAT": "#2f6db5"}
LONGER = ", 4 x tasks"
Point = tuple[float, float]


class Panel:
    """One coordinate system; `left` is where it begins."""

    def __init__(self, left: float, title: str, across: str, up: str, points: Sequence[Point]) -> None:
        self.left, self.drawn = left, list[str]()
        xs, ys = zip(*points, strict=True)
        self.low, self.high = (min(xs), min(ys)), (max(xs), max(ys))
        self._text(WIDE / 2, 16, title, 14)
        self._text(WIDE / 2, HIGH - 6, across, 11)
        self.drawn.append(
            f'<text transform="translate({left + 12:.0f} {HIGH / 2:.0f}) rotate(-90)" text-anchor="middle" '
            f'font-size="11">{up}</text>'
        )
        for i in range(5):
            x = self.low[0] + i / 4 * (self.high[0] - self.low[0])
            y = self.low[1] + i / 4 * (self.high[1] - self.low[1])
            px, py = self.place((x, y))
            self.drawn.append(f'<path d="M{EDGE + left:.0f} {py:.1f}H{left + WIDE - 12:.0f}" stroke="#ddd"/>')
            self._text(EDGE - 16, py + 4, f"{y:.1f}", 10)
            self._text(px - left, HIGH - EDGE + 18, f"{x:.0f}" if self.high[0] > 50 else f"{x:.1f}", 10)

    def place(self, point: Point) -> Point:
        """Where a point falls."""
        x, y = (
            (value - low) / ((high - low) or 1.0) for value, low, high in zip(point, self.low, self.high, strict=True)
        )
        return self.left + EDGE + x * (WIDE - EDGE - 24), HIGH - EDGE - y * (HIGH - EDGE - 40)

    def line(self, points: Sequence[Point], colour: str, dash: str = "") -> None:
        """A line with its points."""
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in map(self.place, points))
        self.drawn.append(
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
        )
        for point in points:
            self.dot(point, colour)

    def dot(self, point: Point, colour: str, name: str = "") -> None:
        """A point, perhaps with its name."""
        x, y = self.place(point)
        self.drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        if name:
            right = x < self.left + 0.7 * WIDE
            anchor, shift = ("start", 5) if right else ("end", -5)
            self.drawn.append(
                f'<text x="{x + shift:.1f}" y="{y + 3:.1f}" text-anchor="{anchor}" font-size="9">{escaped(name)}</text>'
            )

    def _text(self, x: float, y: float, text: str, size: int) -> None:
        at = self.left + x
        self.drawn.append(
            f'<text x="{at:.1f}" y="{y:.1f}" text-anchor="middle" font-size="{size}">{escaped(text)}</text>'
        )


def escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def learning(cells: Mapping[str, Mapping[str, Any]]) -> Panel | None:
    """Accuracy in (solid) and out of distribution (dashed) by tasks seen, of the long runs where they are measured."""
    curves, direct = found(cells, "curve"), found(cells, "direct")
    if not curves:
        return None
    number = len(next(iter(curves.values()))[0][KEPT]["accuracy"])
    curves = {key: scores for key, scores in curves.items() if LONGER in key} or curves
    last = max(int(key.split("|")[1]) for key in curves) * 2
    lines: dict[tuple[str, str], list[Point]] = {}
    for name in COLOURS:
        parts = [(key.split("|"), scores) for key, scores in curves.items()]
        steps = sorted((int(tasks), scores) for (of, tasks), scores in parts if of.removesuffix(LONGER) == name)
        long = next((of for (of, _), _ in parts if of.removesuffix(LONGER) == name), name)
        if not steps or long not in direct:
            continue
        for dash, domains in (("", IN_DOMAINS), ("5 4", OUT_DOMAINS)):
            at = [(0, direct[PRETRAINED]), *steps, (last, direct[long])]
            lines[name, dash] = [(float(tasks), mean(cut(scores, number), domains).value) for tasks, scores in at]
    panel = Panel(0, "Learning: in (solid), out of distribution (dashed)", "tasks seen", "accuracy, %",
                  [point for line in lines.values() for point in line])  # fmt: skip
    for (name, dash), points in lines.items():
        panel.line(points, COLOURS[name], dash)
    return panel


def cut(scores: Scores, number: int) -> Scores:
    """The first episodes, of the first seed."""
    return [{d: {"accuracy": v["accuracy"][:number], "ece": v["ece"]} for d, v in scores[0].items()}]


def forgetting(cells: Mapping[str, Mapping[str, Any]]) -> Panel:
    """The gain out of distribution against the change of retention: dials as lines, every row as a point.

    The pool's dial is that of what each support set chooses. Of its variants only the points are drawn.
    """
    direct, dials = found(cells, "direct"), found(cells, "dial") | found(cells, "routed dial")
    base = direct[PRETRAINED]

    def place(scores: Scores) -> Point:
        return mean(scores, (KEPT,), base).value, mean(scores, OUT_DOMAINS, base).value

    rows = {name: place(scores) for name, scores in direct.items() if name != PRETRAINED}
    lines = {
        name: [(0.0, 0.0), *(place(dials[key]) for key in sorted(dials) if key.split("|")[0] == name), rows[name]]
        for name in (*COLOURS, *(f"{name}{LONGER}" for name in COLOURS))
        if name in rows
    }
    points = [*rows.values(), *(point for line in lines.values() for point in line)]
    title = "Gain against forgetting (dials from 0 to 1; solid: 4 x tasks)"
    panel = Panel(WIDE + 20, title, "change of retention, points",
                  "gain out of distribution, points", points)  # fmt: skip
    for name, point in rows.items():
        panel.dot(point, "#777", "" if "SMAT, " in name and LONGER not in name else name)
    for name, line in lines.items():
        panel.line(line, COLOURS[name.removesuffix(LONGER)], "" if LONGER in name else "5 4")
    return panel


def plot(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """The SVG."""
    panels = [panel for panel in (learning(cells), forgetting(cells)) if panel is not None]
    names = "".join(
        f'<circle cx="{60 + 180 * i}" cy="{HIGH + 12:.0f}" r="4" fill="{colour}"/>'
        f'<text x="{70 + 180 * i}" y="{HIGH + 16:.0f}" font-size="11">{escaped(name)}</text>'
        for i, (name, colour) in enumerate(COLOURS.items())
    )
    drawn = "".join(part for panel in panels for part in panel.drawn)
    wide, high = 2 * WIDE + 40, HIGH + 26
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:.0f} {high:.0f}" font-family="sans-serif" '
        f'fill="#222"><rect width="{wide:.0f}" height="{high:.0f}" fill="#fff"/>{drawn}{names}</svg>\n'
    )


def main() -> None:
    """Write the plots."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--cache", type=Path, default=HOME)
    FILE.write_text(plot(Cells(parser.parse_args().cache / "few_shot.jsonl").found), "utf-8")


if __name__ == "__main__":
    main()
