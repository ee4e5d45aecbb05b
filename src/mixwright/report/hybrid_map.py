"""The picture of a hybrid, and what each of its weights is worth: one line for each place, one column per component."""

from collections.abc import Mapping, Sequence

from mixwright.evaluation.hybrid import HybridExplanation
from mixwright.evaluation.hybrid_counterfactuals import Counterfactual
from mixwright.evaluation.hybrid_rows import Row
from mixwright.report.hybrid_words import left_out_sentences, reasons, row_name, signed, slot_name
from mixwright.report.markup import escape, table, tag
from mixwright.report.palette import Look

_KINDS = {"needs": "Needed", "hurts": "In the way", "even": "No measurable difference"}


def map_section(found: HybridExplanation, looks: Mapping[str, Look], styles: Mapping[str, str]) -> str:
    """Every slot in the order of a pass: each component's weight as a bar and a number, and the layers it gives."""
    of = {slot: row for row in found.rows for slot in row.slots}
    lines = [
        tag(
            "tr",
            tag("th", escape(slot_name(slot)), tag("small", tag("code", escape(slot))), scope="row"),
            *(
                _cell(of[slot], m, component.layers[place] if place < len(component.layers) else "", styles)
                for m, component in enumerate(found.components)
            ),
        )
        for place, slot in enumerate(found.slots)
    ]
    shared = [row_name(row) for row in found.rows if len(row.slots) > 1]
    note = (
        "Read from top to bottom, as a token passes. A bar is a mixture weight; a component without a bar does not run."
    )
    if shared:
        note += f" One row for: {'; '.join(shared)}."
    if any(row.spread is not None for row in found.rows):
        note += " Weights differ from token to token: shown are their mean and, after \u00b1, their standard deviation."
    head = tag(
        "tr", tag("th", "Place", scope="col"), *(_head(c.name, looks[c.name], styles[c.name]) for c in found.components)
    )
    sizes = [f"{c.name}: {c.architecture}, width {c.width}, {c.parameters:,} parameters" for c in found.components]
    drawn = tag("table", tag("thead", head), tag("tbody", *lines), class_="map")
    return tag(
        "section",
        tag("h2", "The hybrid"),
        tag("p", escape(note), class_="note"),
        tag("div", drawn, class_="wide", tabindex="0"),
        tag("ul", *(tag("li", tag("bdi", escape(size))) for size in sizes), class_="sizes"),
        id="map",
    )


def _head(name: str, look: Look, style: str) -> str:
    return tag("th", tag("b", escape(look.label), class_=f"key {style}"), " ", tag("bdi", escape(name)), scope="col")


def _cell(row: Row, m: int, layers: str, styles: Mapping[str, str]) -> str:
    weight = row.weights[m]
    style = list(styles.values())[m]
    bar = tag("span", tag("i", style=f"width:{100 * weight:.1f}%"), class_=f"weight {style}", aria_hidden="true")
    spread = f" \u00b1 {row.spread[m]:.2f}" if row.spread is not None else ""
    number = "0" if weight == 0 else "1" if weight == 1 else f"{weight:.2f}"
    said = tag("b", f"{number}{spread}", class_="none" if weight == 0 else None)
    return tag("td", bar, said, tag("small", escape(layers)) if layers else "")


def worth_section(found: HybridExplanation) -> str:
    """Sentences by kind, what leaving a component out does, and the table of all counterfactuals."""
    title = tag("h2", "What each weight is worth")
    if not found.counterfactuals:
        why = "no text was given." if found.texts is None else "there is one component, with weight 1 everywhere."
        return tag("section", title, tag("p", f"Not measured: {why}", class_="note"), id="worth")
    note = (
        "One weight at a time is changed, the others of its row share the rest as before, nothing is trained again. "
        "Above 0 the model got worse without what was changed, so that much is what it was worth."
    )
    said = reasons(found)
    groups = [
        tag("h3", words) + tag("ul", *(tag("li", escape(text)) for k, text in said if k == kind), class_="reasons")
        for kind, words in _KINDS.items()
        if any(k == kind for k, _ in said)
    ]
    whole = tag("h3", "A component left out everywhere") + tag(
        "ul", *(tag("li", escape(text)) for text in left_out_sentences(found)), class_="reasons"
    )
    return tag("section", title, tag("p", note, class_="note"), *groups, whole, _table(found), id="worth")


def _table(found: HybridExplanation) -> str:
    most = max((abs(c.change.value) for c in found.counterfactuals), default=0.0)
    lines: list[str] = []
    for row in found.rows:
        for m, component in enumerate(found.components):
            own = {c.forced: c for c in found.counterfactuals if (c.row, c.component) == (row.name, component.name)}
            name = tag("th", escape(row_name(row)), scope="row") if m == 0 else tag("th", "", scope="row")
            cells = [_change(own[word], most) for word in ("0", "1", "uniform")]
            who = tag("td", tag("bdi", escape(component.name)), class_="who")
            lines.append(tag("tr", name, who, tag("td", f"{row.weights[m]:.2f}"), *cells))
    even = f"At {1 / max(len(found.components), 1):.2g}"
    head = ("Place", "Component", "Weight", "Without it", "Nothing else", even)
    caption = "Change of the loss in nats per token, with its 95 % interval; a stronger colour is more."
    return tag("h3", "Every weight") + tag("p", caption, class_="note") + tag("div", table(head, lines), class_="worth")


def _change(one: Counterfactual, most: float) -> str:
    if one.kept:
        return tag("td", "as it is", class_="kept")
    gap = one.change
    shown = f"{signed(gap.value)} " + tag("small", f"{signed(gap.low)} to {signed(gap.high)}")
    return tag("td", shown, class_=shade(gap.value, most) if gap.excludes_zero() else "unsure")


def shade(value: float, most: float) -> str:
    """The class of a cell: three steps of worse or of better, by the share of the largest change."""
    part = abs(value) / most if most > 0 else 0.0
    step = 3 if part > 0.5 else 2 if part > 0.15 else 1
    return f"step-{'m' if value > 0 else 'p'}{step}"


def slices_section(found: HybridExplanation) -> str:
    """Losses of every system on every slice, the least in bold, and what the hybrid is beside the best alone."""
    title = tag("h2", "Where it helps")
    if not found.slices:
        return tag("section", title, tag("p", "Not measured: no text was given.", class_="note"), id="slices")
    systems = [one.system for one in found.systems]
    alone = [one.system for one in found.systems if one.is_component]
    lines: list[str] = []
    for one in found.slices:
        least = min(one.losses.values())
        cells = [_loss(one.losses[system], least=one.losses[system] == least) for system in systems]
        best = min(alone, key=lambda name, losses=one.losses: losses[name])
        gap = one.losses[systems[0]] - one.losses[best]
        rest = (tag("td", signed(gap)), tag("td", tag("bdi", escape(best)), class_="who"))
        counts = (tag("td", f"{one.documents:,}"), tag("td", f"{one.tokens:,}"))
        lines.append(tag("tr", tag("th", tag("bdi", escape(one.name)), scope="row"), *counts, *cells, *rest))
    head = ("Slice", "Texts", "Tokens", *systems, "Hybrid minus best alone", "Best alone")
    note = (
        "Loss in nats per token; the least of a line is bold. The best component is chosen slice by slice, on these "
        "very texts, which is in its favour. Small slices are uncertain: intervals stand above, for all texts only."
    )
    return tag("section", title, tag("p", note, class_="note"), table(head, lines), _systems(found), id="slices")


def _loss(value: float, *, least: bool) -> str:
    return tag("td", tag("b", f"{value:.3f}") if least else f"{value:.3f}")


def _systems(found: HybridExplanation) -> str:
    rows: list[str] = []
    for one in found.systems[1:]:
        assert one.against is not None
        gap = one.against.difference
        cells = (f"{one.loss:.3f}", signed(gap.value), f"{signed(gap.low)} to {signed(gap.high)}", one.against.word)
        shown = (tag("td", cell, class_="who" if cell == one.against.word else None) for cell in cells)
        rows.append(tag("tr", tag("th", tag("bdi", escape(one.system)), scope="row"), *shown))
    head = ("The hybrid beside", "Its loss", "Hybrid minus it", "95 %", "The hybrid is")
    return tag("h3", "All texts, paired by document") + table(head, rows)


def missing_section(missing: Sequence[str]) -> str:
    """What the page can't say."""
    items = (tag("li", escape(text)) for text in missing)
    return tag("section", tag("h2", "What was not measured"), tag("ul", *items, class_="reasons"), id="missing")
