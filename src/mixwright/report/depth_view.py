"""Where in the backbone each expert acts: its say and its weight by depth, as charts and as a table."""

from collections.abc import Mapping, Sequence

from mixwright.evaluation.explain import Explanation
from mixwright.report.markup import escape, table, tag
from mixwright.report.palette import Look
from mixwright.report.prominence import LISTED
from mixwright.report.svg import Segment, sparkline, stacked_bars


def depth_section(
    explanation: Explanation, order: Sequence[str], drawn: Mapping[str, Look], styles: Mapping[str, str]
) -> str:
    """Two charts side by side: the routing weight of each expert at each depth, and its contribution."""
    names = short_depths(explanation.depths)
    place = {expert: number for number, expert in enumerate(explanation.experts)}

    def segments(row: Sequence[float], depth: str, unit: str) -> list[Segment]:
        listed = [
            Segment(row[place[e]], styles[e], drawn[e].label, f"{e}, {depth}: {_amount(row[place[e]], unit)}")
            for e in order[:LISTED]
        ]
        rest = sum(row) - sum(segment.length for segment in listed)
        others = f"{len(order) - LISTED} others, {depth}: {_amount(rest, unit)}"
        return listed if len(order) <= LISTED else [*listed, Segment(rest, "none", "", others)]

    def chart(values: Sequence[Sequence[float]], full: float, unit: str, title: str) -> str:
        depths = zip(names, explanation.depths, values, strict=True)
        rows = [(name, segments(row, depth, unit)) for name, depth, row in depths]
        return tag("figure", tag("figcaption", escape(title)), stacked_bars(rows, full, title))

    most = max((sum(row) for row in explanation.contribution_by_depth), default=0.0)
    weight = max((sum(row) for row in explanation.weight_by_depth), default=0.0)
    return tag(
        "section",
        tag("h2", "Experts by depth"),
        tag(
            "p",
            "First, how much say the router gave each expert; then, how far each expert moved the layer: "
            "an expert can have the say and do little with it.",
            class_="note",
        ),
        tag(
            "div",
            chart(explanation.weight_by_depth, max(weight, 1e-9), "weight", "Routing weight"),
            chart(
                explanation.contribution_by_depth,
                most,
                "%",
                f"Contribution (widest bar {100 * most:.1f}% of the layer)",
            ),
            class_="pair",
        ),
        id="depth",
    )


def _amount(value: float, unit: str) -> str:
    return f"{100 * value:.2f}%" if unit == "%" else f"{unit} {value:.3f}"


def short_depths(depths: Sequence[str]) -> list[str]:
    """Names of a few characters: `model.layers.3` -> `3`, with `enc`/`dec` where a backbone has both."""
    both = any("encoder" in depth for depth in depths) and any("decoder" in depth for depth in depths)

    def short(depth: str) -> str:
        last = depth.rsplit(".", 1)[-1]
        stack = "dec " if "decoder" in depth else "enc "
        return f"{stack if both else ''}{last[:6]}"

    return [short(depth) for depth in depths]


def contribution_section(
    explanation: Explanation, order: Sequence[str], drawn: Mapping[str, Look], styles: Mapping[str, str]
) -> str:
    """The table of contribution norms: one row for each expert, and every depth as numbers behind a fold."""
    place = {expert: number for number, expert in enumerate(explanation.experts)}
    most = max((value for row in explanation.contribution_by_depth for value in row), default=0.0)
    names = short_depths(explanation.depths)
    rows: list[str] = []
    for expert in order:
        weights = [row[place[expert]] for row in explanation.weight_by_depth]
        added = [row[place[expert]] for row in explanation.contribution_by_depth]
        rows.append(
            tag(
                "tr",
                tag(
                    "th",
                    tag("b", escape(drawn[expert].label), class_=f"key {styles[expert]}"),
                    tag("bdi", escape(expert)),
                    scope="row",
                ),
                tag("td", f"{explanation.led(expert)}"),
                tag("td", f"{_mean(weights):.3f}"),
                tag("td", f"{100 * _mean(added):.2f}%"),
                tag(
                    "td",
                    f"{100 * max(added, default=0.0):.2f}% ",
                    tag("small", f"at {escape(names[added.index(max(added))])}"),
                ),
                tag("td", sparkline(added, most, styles[expert], f"{expert}: contribution by depth")),
            )
        )
    head = ("Expert", "Leads", "Mean weight", "Contribution", "Largest", "By depth")
    return tag(
        "section",
        tag("h2", "Contribution norms"),
        tag(
            "p",
            "The length of what an expert adds to a layer, over the length of what the frozen layer gives for the same "
            "token: \u2016w\u00b7s\u00b7B\u00b7A\u00b7u\u2016 / \u2016W\u00b7u\u2016, averaged over tokens and sites.",
            class_="note",
        ),
        table(head, rows),
        _by_depth_details(explanation, order, names),
    )


def _by_depth_details(explanation: Explanation, order: Sequence[str], names: Sequence[str]) -> str:
    place = {expert: number for number, expert in enumerate(explanation.experts)}
    rows = [
        tag(
            "tr",
            tag("th", tag("bdi", escape(expert)), scope="row"),
            *(tag("td", f"{100 * row[place[expert]]:.2f}%") for row in explanation.contribution_by_depth),
        )
        for expert in order
    ]
    return tag("details", tag("summary", "Every depth as numbers"), table(("Expert", *names), rows))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
