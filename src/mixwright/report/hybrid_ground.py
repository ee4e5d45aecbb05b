"""The ground around a choice of mixture weights, and what components hand over at the boundaries of blocks."""

from collections.abc import Mapping, Sequence

from mixwright.evaluation.hybrid import HybridExplanation
from mixwright.evaluation.hybrid_boundaries import Boundary
from mixwright.evaluation.hybrid_sweep import Grid, Sweep
from mixwright.report.hybrid_words import FLAT, flatness_sentences, row_name, signed, slot_name, sweep_sentence
from mixwright.report.lines import Line, Mark, line_chart
from mixwright.report.markup import escape, table, tag


def ground_section(found: HybridExplanation, styles: Mapping[str, str]) -> str:
    """A curve for each row with the choice marked, the two rows that matter most against each other, and the bend."""
    title = tag("h2", "The ground around the choice")
    if not found.sweeps:
        note = "Not measured; what was not is listed at the end."
        return tag("section", title, tag("p", note, class_="note"), id="ground")
    places = {row.name: row_name(row) for row in found.rows}
    note = (
        "One weight goes from 0 to 1, its neighbours share the rest, nothing is trained again. The dot is the choice, "
        "where the model stands. A valley that is wide and low says that the exact weight does not matter much."
    )
    figures = [_curve(one, places[one.row], styles[one.component]) for one in found.sweeps]
    said = [sweep_sentence(one, places[one.row]) for one in found.sweeps]
    flat = [] if found.flatness is None else flatness_sentences(found.flatness)
    listed = tag("ul", *(tag("li", escape(text)) for text in [*said, *flat]), class_="reasons")
    surface = "" if found.grid is None else _surface(found.grid, places)
    drawn = tag("div", *figures, class_="curves-grid")
    return tag(
        "section", title, tag("p", note, class_="note"), drawn, listed, surface, _bends(found, places), id="ground"
    )


def _curve(one: Sweep, place: str, style: str) -> str:
    line = Line(f"loss by weight of {one.component}", one.weights, one.losses, style, "")
    mark = Mark(one.chosen, one.chosen_loss, style, f"chosen: {one.chosen:.2f}, loss {one.chosen_loss:.3f}")
    title = (
        f"{place}: loss while the weight of {one.component} goes from 0 to 1; least {min(one.losses):.3f} at "
        f"{one.weights[one.best]:.1f}, chosen {one.chosen:.2f} with {one.chosen_loss:.3f}"
    )
    drawn = line_chart([line], title, x_name=f"weight of {one.component}"[:28], marks=[mark])
    return tag("figure", tag("figcaption", escape(place)), drawn)


def _bends(found: HybridExplanation, places: Mapping[str, str]) -> str:
    lines = [
        tag(
            "tr",
            tag("th", escape(places[one.row]), scope="row"),
            tag("td", tag("bdi", escape(one.component)), class_="who"),
            *(tag("td", f"{loss:.3f}") for loss in one.losses),
            tag("td", f"{signed(one.curvature)} ", tag("small", f"at {one.curved_at:.2f}")),
        )
        for one in found.sweeps
    ]
    head = ("Place", "Weight of", *(f"{weight:.1f}" for weight in found.sweeps[0].weights), "Curvature")
    note = "Curvature: second difference of the loss, in nats per squared weight."
    return tag("details", tag("summary", "As numbers"), tag("p", note, class_="note"), table(head, lines))


def _surface(grid: Grid, places: Mapping[str, str]) -> str:
    """Two rows against each other as a table; the flat stretch is marked, and the cell nearest to the choice."""
    first, second = (places[row] for row in grid.rows)
    least = min(min(row) for row in grid.losses)
    most = max(max(row) for row in grid.losses) - least

    def nearest(value: float) -> int:
        return min(range(len(grid.weights)), key=lambda at: abs(grid.weights[at] - value))

    here = (nearest(grid.chosen[0]), nearest(grid.chosen[1]))
    lines = [
        tag(
            "tr",
            tag("th", f"{weight:.1f}", scope="row"),
            *(_cell(grid.losses[i][j], least, most, here=(i, j) == here) for j in range(len(grid.weights))),
        )
        for i, weight in enumerate(grid.weights)
    ]
    caption = (
        f"Loss by the weight of {grid.component}: down the side in {first.lower()}, across in {second.lower()}. "
        f"Outlined: nearest to the choice, {grid.chosen[0]:.2f} and {grid.chosen[1]:.2f}. Blue: within {FLAT} nats of "
        f"the least, {least:.3f}; the browner, the worse."
    )
    head = (f"{first} \u2193 {second} \u2192", *(f"{weight:.1f}" for weight in grid.weights))
    drawn = tag("div", table(head, lines), class_="surface")
    return tag("h3", "Two rows against each other") + tag("p", escape(caption), class_="note") + drawn


def _cell(loss: float, least: float, most: float, *, here: bool) -> str:
    part = (loss - least) / most if most > 0 else 0.0
    step = (
        "p2" if loss <= least + FLAT else "p0" if part < 0.1 else "m1" if part < 0.3 else "m2" if part < 0.6 else "m3"
    )
    return tag("td", f"{loss:.3f}", class_=f"step-{step}{' here' if here else ''}")


def boundaries_section(found: HybridExplanation) -> str:
    """Lengths of states on either side of the projectors, and how much of a component's own stream is left."""
    title = tag("h2", "At the boundaries")
    if not found.boundaries:
        return tag("section", title, tag("p", "Not measured: no text was given.", class_="note"), id="boundaries")
    note = (
        "Root mean square of hidden states, before and after the ways in and out of each component. Likeness compares "
        "what a component\u2019s layers give inside the hybrid with what they give when it runs alone: 1 is the same "
        "up to rotation and scale, 0 nothing in common (linear CKA)."
    )
    lines = [_boundary(one) for one in found.boundaries]
    head = ("Place", "Component", "Stream", "Handed in", "Given back", "Given when alone", "Likeness", "Stream after")
    said = tag("ul", *(tag("li", escape(text)) for text in _strange(found.boundaries)), class_="reasons")
    return tag("section", title, tag("p", note, class_="note"), said, table(head, lines), id="boundaries")


def _boundary(one: Boundary) -> str:
    numbers = (one.stream, one.given, one.returned, one.own, one.likeness, one.mixed)
    cells = (tag("td", "-" if value is None else f"{value:.3g}") for value in numbers)
    who = tag("td", tag("bdi", escape(one.component)), class_="who")
    return tag("tr", tag("th", escape(slot_name(one.slot)), scope="row"), who, *cells)


def _strange(found: Sequence[Boundary]) -> list[str]:
    """The place where a component is least itself, and the largest jump in length."""
    liked = [(one.likeness, one) for one in found if one.likeness is not None]
    said: list[str] = []
    if liked:
        like, least = min(liked, key=lambda pair: pair[0])
        if like > 0.999:
            said.append("Every component gives what it gives alone: likeness is above 0.999 everywhere.")
        else:
            said.append(f"{least.component} is least itself in {slot_name(least.slot).lower()}: likeness {like:.2f}.")
    jumps = [(one.returned / one.own, one) for one in found if one.own > 0 and one.returned > 0]
    if jumps:
        ratio, one = max(jumps, key=lambda pair: max(pair[0], 1 / pair[0]))
        if max(ratio, 1 / ratio) > 1.5:
            said.append(
                f"In {slot_name(one.slot).lower()} the states of {one.component} are {ratio:.2f} times as long as when "
                "it runs alone."
            )
    return said
