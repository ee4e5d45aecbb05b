"""One self-contained page that explains one text: who acted where, how strongly, and what it was worth."""

from collections.abc import Mapping, Sequence

from mixwright.evaluation.explain import Explanation
from mixwright.report.markup import document, escape, tag
from mixwright.report.palette import Look, looks, neutral
from mixwright.report.provenance import provenance
from mixwright.report.svg import Dot, Segment, dots, sparkline, stacked_bars
from mixwright.report.text_view import text_view

_LISTED = 12
VIEWS = (("lead", "Leading expert"), ("gain", "What the experts save"), ("without", "What {} saves"))


def explanation_page(explanation: Explanation) -> str:
    """The page as one string of HTML: no script, no file beside it, nothing from the network."""
    order = _by_prominence(explanation)
    drawn = {**looks(explanation.experts, order), "": neutral()}
    styles = {expert: f"x{place}" for place, expert in enumerate(explanation.experts)}
    body = [
        tag("a", "Skip the text", href="#depth", class_="skip"),
        tag("header", *_headline(explanation, order), class_="page"),
        tag(
            "main",
            _text_section(explanation, order, drawn, styles),
            _depth_section(explanation, order, drawn, styles),
            _table_section(explanation, order, drawn, styles),
            _loss_section(explanation),
            provenance(explanation.composition),
            class_="page",
        ),
    ]
    shown = {styles[expert]: drawn[expert] for expert in order}
    return document("Which expert acted on which token", body, palette_rules(shown))


def palette_rules(styles: Mapping[str, Look]) -> str:
    """Style rules that give each expert's class its colours on light and on dark pages, and its underline."""
    light = "".join(f".{c}{{--c:{k.colour[0]};--t:{k.tint[0]};--u:{k.line}}}\n" for c, k in styles.items())
    dark = "".join(f".{c}{{--c:{k.colour[1]};--t:{k.tint[1]}}}\n" for c, k in styles.items())
    return f"{light}@media screen and (prefers-color-scheme:dark){{\n{dark}}}\n"


def _by_prominence(explanation: Explanation) -> list[str]:
    """The experts that lead a token or act somewhere, those that lead most first."""
    acting = {expert: 0.0 for expert in explanation.experts}
    for token in explanation.tokens:
        for one in token.experts:
            acting[one.expert] += one.contribution
        if token.leader is not None:
            acting[token.leader] += 0.0
    ranked = sorted(explanation.experts, key=lambda expert: (-explanation.led(expert), -acting[expert]))
    return [expert for expert in ranked if explanation.led(expert) or acting[expert] > 0]


def _headline(explanation: Explanation, order: Sequence[str]) -> list[str]:
    total = len(explanation.tokens)
    leading = [expert for expert in order if explanation.led(expert)]
    parts = [tag("p", "mixwright explain", class_="kicker"), tag("h1", "Which expert acted on which token")]
    if leading:
        share = round(100 * explanation.led(leading[0]) / total)
        others = f", ahead of {len(leading) - 1} others" if len(leading) > 2 else ""
        lead = tag("bdi", escape(leading[0]))
        parts.append(tag("p", tag("strong", lead), f" leads {share}% of {total} tokens{others}.", class_="lede"))
    parts.append(tag("p", *_worth(explanation), class_="lede"))
    facts = [("tokens", f"{total}"), ("experts that act", f"{len(order)} of {len(explanation.experts)}")]
    named = (("loss", "nats per token"), ("loss_backbone", "backbone alone"), ("loss_without", f"without {explanation.without}"))
    losses = ((label, explanation.mean_loss(system)) for system, label in named)
    facts += [(label, f"{value:.2f}") for label, value in losses if value is not None]
    return [*parts, tag("dl", *(tag("div", tag("dt", escape(k)), tag("dd", escape(v))) for k, v in facts), class_="facts")]


def _worth(explanation: Explanation) -> list[str]:
    """What the experts saved, in a sentence."""
    loss, backbone, without = (explanation.mean_loss(s) for s in ("loss", "loss_backbone", "loss_without"))
    if loss is None or backbone is None:
        return ["This backbone predicts no tokens, so there is no loss to compare."]
    said = f"The experts {'save' if loss <= backbone else 'cost'} {abs(backbone - loss):.2f} nats per token"
    if without is None:
        return [said, "."]
    name = tag("bdi", escape(explanation.without))
    return [f"{said}; without ", name, f" the text costs {_signed(without - loss)}."]


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\u2212")


def _text_section(
    explanation: Explanation, order: Sequence[str], drawn: Mapping[str, Look], styles: Mapping[str, str]
) -> str:
    views: list[str] = []
    available = {"lead": True, "gain": explanation.mean_loss("loss_backbone") is not None, "without": explanation.without}
    chosen = [(name, label) for name, label in VIEWS if available[name]]
    for name, label in chosen if len(chosen) > 1 else ():
        views.append(tag("input", type="radio", name="view", id=f"v-{name}", checked=True if name == "lead" else None))
        views.append(tag("label", escape(label.format(explanation.without)), for_=f"v-{name}"))
    scale = "".join(
        tag("span", text, class_=f"tok step-{step}")
        for step, text in (("m3", "costs 1.5 nats or more"), ("m1", "costs 0.1"), ("p0", "no change"), ("p1", "saves 0.1"),
                           ("p2", "0.5"), ("p3", "1.5 nats or more"))
    )
    return tag(
        "section",
        tag("h2", "The text"),
        tag(
            "p",
            "Each token wears the colour, underline and label of the expert that moved the model most. "
            "Point at a token, or reach it with the tab key, to see who acted on it.",
            class_="note",
        ),
        *views,
        tag("ul", *(_legend(explanation, expert, drawn, styles) for expert in order[:_LISTED]), class_="legend"),
        tag("p", scale, class_="scale"),
        text_view(explanation, drawn, styles),
        _more(order),
        class_="reading",
    )


def _legend(
    explanation: Explanation, expert: str, drawn: Mapping[str, Look], styles: Mapping[str, str]
) -> str:
    led = explanation.led(expert)
    key = tag("b", escape(drawn[expert].label), class_=f"key {styles[expert]}")
    return tag("li", key, tag("bdi", escape(expert)), tag("small", f"{led} token{'' if led == 1 else 's'}"))


def _more(order: Sequence[str]) -> str:
    return tag("p", f"{len(order) - _LISTED} more experts act here; the table lists them.", class_="note") if len(order) > _LISTED else ""


def _depth_section(
    explanation: Explanation, order: Sequence[str], drawn: Mapping[str, Look], styles: Mapping[str, str]
) -> str:
    names = short_depths(explanation.depths)
    place = {expert: number for number, expert in enumerate(explanation.experts)}

    def chart(table: Sequence[Sequence[float]], full: float, unit: str, title: str) -> str:
        rows = [
            (
                name,
                [
                    Segment(row[place[e]], styles[e], drawn[e].label, f"{e}, {depth}: {_amount(row[place[e]], unit)}")
                    for e in order
                ],
            )
            for name, depth, row in zip(names, explanation.depths, table, strict=True)
        ]
        return tag("figure", tag("figcaption", escape(title)), stacked_bars(rows, full, title))

    most = max((sum(row) for row in explanation.contribution_by_depth), default=0.0)
    weight = max((sum(row) for row in explanation.weight_by_depth), default=0.0)
    return tag(
        "section",
        tag("h2", "Experts by depth"),
        tag(
            "p",
            "Left, how much say the router gave each expert. Right, how far each expert moved the layer: "
            "an expert can have the say and do little with it.",
            class_="note",
        ),
        tag(
            "div",
            chart(explanation.weight_by_depth, max(weight, 1e-9), "weight", "Routing weight"),
            chart(explanation.contribution_by_depth, most, "%", f"Contribution (widest bar {100 * most:.1f}% of the layer)"),
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


def _table_section(
    explanation: Explanation, order: Sequence[str], drawn: Mapping[str, Look], styles: Mapping[str, str]
) -> str:
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
                tag("th", tag("b", escape(drawn[expert].label), class_=f"key {styles[expert]}"), tag("bdi", escape(expert)), scope="row"),
                tag("td", f"{explanation.led(expert)}"),
                tag("td", f"{_mean(weights):.3f}"),
                tag("td", f"{100 * _mean(added):.2f}%"),
                tag("td", f"{100 * max(added, default=0.0):.2f}% ", tag("small", f"at {escape(names[added.index(max(added))])}")),
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
        _table(head, rows),
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
    return tag("details", tag("summary", "Every depth as numbers"), _table(("Expert", *names), rows))


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    top = tag("tr", *(tag("th", escape(name), scope="col") for name in head))
    return tag("div", tag("table", tag("thead", top), tag("tbody", *rows)), class_="wide", tabindex="0")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _loss_section(explanation: Explanation) -> str:
    found = [
        (name, explanation.mean_loss(system))
        for name, system in (
            ("composed model", "loss"),
            (f"without {explanation.without}", "loss_without"),
            ("backbone alone", "loss_backbone"),
        )
    ]
    rows = [(name, value) for name, value in found if value is not None]
    if not rows:
        return ""
    base = rows[0][1]
    table = [
        tag(
            "tr",
            tag("th", tag("bdi", escape(name)), scope="row"),
            tag("td", f"{value:.3f}"),
            tag("td", "" if name == rows[0][0] else _signed(value - base)),
        )
        for name, value in rows
    ]
    chart = dots([Dot(name, value, None, None, "") for name, value in rows], "Mean loss of each system")
    return tag(
        "section",
        tag("h2", "What it was worth"),
        tag("p", "Mean loss on this text in nats per predicted token; lower is better.", class_="note"),
        tag("div", _table(("System", "Loss", "Against composed"), table), tag("figure", chart), class_="pair"),
        _dependent(explanation),
    )


def _dependent(explanation: Explanation, shown: int = 8) -> str:
    """The tokens that lose most without the left-out expert."""
    costs = [
        (token.loss_without - token.loss, token)
        for token in explanation.tokens
        if token.loss_without is not None and token.loss is not None
    ]
    worst = sorted(costs, key=lambda pair: -pair[0])[:shown]
    items = [
        tag("li", tag("code", tag("bdi", escape(token.text.strip() or token.token))), tag("small", _signed(cost)))
        for cost, token in worst
        if cost > 0.005
    ]
    if not items:
        return ""
    return tag("p", "Tokens that lose most without ", tag("bdi", escape(explanation.without)), ":", class_="note") + tag(
        "ul", *items, class_="chips"
    )
