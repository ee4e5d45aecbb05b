"""One self-contained page that explains one text: who acted where, how strongly, and what it was worth."""

from collections.abc import Mapping, Sequence

from mixwright.evaluation.explain import Explanation
from mixwright.report.depth_view import contribution_section, depth_section
from mixwright.report.markup import document, escape, table, tag
from mixwright.report.palette import Look, looks, neutral, palette_rules
from mixwright.report.prominence import LISTED, by_prominence
from mixwright.report.provenance import provenance
from mixwright.report.svg import Dot, dots
from mixwright.report.text_view import text_view

VIEWS = (("lead", "Leading expert"), ("gain", "What the experts save"), ("without", "What {} saves"))


def explanation_page(explanation: Explanation) -> str:
    """The page as one string of HTML: no script, no file beside it, nothing from the network."""
    order = by_prominence(explanation)
    drawn = {**looks(explanation.experts, order), "": neutral()}
    styles = {expert: f"x{place}" for place, expert in enumerate(explanation.experts)}
    body = [
        tag("a", "Skip the text", href="#depth", class_="skip"),
        tag("header", *_headline(explanation, order), class_="page"),
        tag(
            "main",
            _text_section(explanation, order, drawn, styles),
            depth_section(explanation, order, drawn, styles),
            contribution_section(explanation, order, drawn, styles),
            _loss_section(explanation),
            provenance(explanation.composition),
            class_="page",
        ),
    ]
    shown = {styles[expert]: drawn[expert] for expert in order}
    return document("Which expert acted on which token", body, palette_rules(shown))


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
    named = (
        ("loss", "nats per token"),
        ("loss_backbone", "backbone alone"),
        ("loss_without", f"without {explanation.without}"),
    )
    losses = ((label, explanation.mean_loss(system)) for system, label in named)
    facts += [(label, f"{value:.2f}") for label, value in losses if value is not None]
    return [
        *parts,
        tag("dl", *(tag("div", tag("dt", escape(k)), tag("dd", escape(v))) for k, v in facts), class_="facts"),
    ]


def _worth(explanation: Explanation) -> list[str]:
    """What the experts saved, in a sentence."""
    loss, backbone, without = (explanation.mean_loss(s) for s in ("loss", "loss_backbone", "loss_without"))
    if loss is None or backbone is None:
        return ["This backbone predicts no tokens, so there is no loss to compare."]
    said = f"The experts {'save' if loss <= backbone else 'cost'} {abs(backbone - loss):.2f} nats per token"
    if without is None:
        return [said, "."]
    name = tag("bdi", escape(explanation.without))
    change = f"{abs(without - loss):.2f} {'more' if without >= loss else 'less'}"
    return [f"{said}; without ", name, f" each would cost {change}."]


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}".replace("-", "\u2212")


def _text_section(
    explanation: Explanation, order: Sequence[str], drawn: Mapping[str, Look], styles: Mapping[str, str]
) -> str:
    views: list[str] = []
    available = {
        "lead": True,
        "gain": explanation.mean_loss("loss_backbone") is not None,
        "without": explanation.without,
    }
    chosen = [(name, label) for name, label in VIEWS if available[name]]
    for name, label in chosen if len(chosen) > 1 else ():
        views.append(tag("input", type="radio", name="view", id=f"v-{name}", checked=True if name == "lead" else None))
        views.append(tag("label", escape(label.format(explanation.without)), for_=f"v-{name}"))
    scale = "".join(
        tag("span", text, class_=f"tok step-{step}")
        for step, text in (
            ("m3", "costs 1.5 nats or more"),
            ("m1", "costs 0.1"),
            ("p0", "no change"),
            ("p1", "saves 0.1"),
            ("p2", "0.5"),
            ("p3", "1.5 nats or more"),
        )
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
        tag("ul", *(_legend(explanation, expert, drawn, styles) for expert in order[:LISTED]), class_="legend"),
        tag("p", scale, class_="scale"),
        text_view(explanation, drawn, styles),
        _more(order),
        class_="reading",
    )


def _legend(explanation: Explanation, expert: str, drawn: Mapping[str, Look], styles: Mapping[str, str]) -> str:
    led = explanation.led(expert)
    key = tag("b", escape(drawn[expert].label), class_=f"key {styles[expert]}")
    return tag("li", key, tag("bdi", escape(expert)), tag("small", f"{led} token{'' if led == 1 else 's'}"))


def _more(order: Sequence[str]) -> str:
    return (
        tag("p", f"{len(order) - LISTED} more experts act here; the table lists them.", class_="note")
        if len(order) > LISTED
        else ""
    )


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
    lines = [
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
        tag("div", table(("System", "Loss", "Against composed"), lines), tag("figure", chart), class_="pair"),
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
    return tag(
        "p", "Tokens that lose most without ", tag("bdi", escape(explanation.without)), ":", class_="note"
    ) + tag("ul", *items, class_="chips")
