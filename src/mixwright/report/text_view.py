"""The explained text: every token coloured by its leading expert, with what is known about it one hover away.

The text in the page is the exact text: labels and signs are drawn by the style sheet, not written between the tokens.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from mixwright.evaluation.explain import ActingExpert, ExplainedToken, Explanation
from mixwright.evaluation.neuron_text import NeuronToken
from mixwright.report.markup import escape, tag, visible
from mixwright.report.palette import Look

GAINS = (0.1, 0.5, 1.5)


def text_view(explanation: Explanation, looks: Mapping[str, Look], styles: Mapping[str, str]) -> str:
    """The streams of an explanation. `styles`: expert -> style class."""
    streams = list(dict.fromkeys(token.stream for token in explanation.tokens))
    blocks: list[str] = []
    for stream in streams:
        tokens = [(place, token) for place, token in enumerate(explanation.tokens) if token.stream == stream]
        if len(streams) > 1:
            blocks.append(tag("h3", escape({"source": "Input", "target": "Answer"}.get(stream, stream))))
        blocks.append(_block(explanation, stream, tokens, looks, styles))
    return "".join(blocks)


def _block(
    explanation: Explanation,
    stream: str,
    tokens: Sequence[tuple[int, ExplainedToken]],
    looks: Mapping[str, Look],
    styles: Mapping[str, str],
) -> str:
    before = [None, *(token.leader for _, token in tokens)]
    drawn = [
        _token(explanation, place, token, leads=token.leader != earlier, looks=looks, styles=styles)
        for (place, token), earlier in zip(tokens, before, strict=False)
    ]
    tail = escape(explanation.tails.get(stream, ""))
    return tag("div", *drawn, tail, class_="text", dir="auto", data_stream=stream)


def _token(
    explanation: Explanation,
    place: int,
    token: ExplainedToken,
    *,
    leads: bool,
    looks: Mapping[str, Look],
    styles: Mapping[str, str],
) -> str:
    classes = ["tok", styles.get(token.leader or "", "none"), *kind_of(token), *_gain(token)]
    sign = None
    if leads and token.leader is not None:
        classes.append("first")
        sign = looks[token.leader].label
    return with_tip(place, token, _tip(explanation, token, looks, styles), classes, sign)


def with_tip(
    place: int, token: ExplainedToken | NeuronToken, tip: Sequence[str], classes: Sequence[str], sign: str | None
) -> str:
    """A token that shows `tip` while it has the pointer or the focus. `sign`: what is drawn beside it."""
    return tag(
        "span",
        marked(token.text),
        tag("span", *tip, class_="tip", role="tooltip", id=f"t{place}"),
        class_=" ".join(classes),
        tabindex="0",
        data_k=sign,
        data_token=token.token if token.special else None,
        aria_describedby=f"t{place}",
    )


def marked(text: str) -> str:
    """The token's slice; line feeds and tabs are wrapped so that the style sheet can draw a sign before them."""
    marked = escape(text).replace("\t", '<span class="tab">\t</span>')
    return marked.replace("\n", '<span class="feed">\n</span>')


def kind_of(token: ExplainedToken | NeuronToken) -> list[str]:
    """Style classes of tokens that show nothing by themselves."""
    if token.special:
        return ["special"]
    if not token.text:
        return ["part"]
    return ["blank"] if not token.text.strip(" ") else []


def _gain(token: ExplainedToken) -> list[str]:
    """Classes for the two loss views: what the experts saved on this token, and what the left-out one did."""
    return [
        f"{view}{gain_step(other - token.loss)}"
        for view, other in (("g", token.loss_backbone), ("w", token.loss_without))
        if token.loss is not None and other is not None
    ]


def gain_step(gain: float) -> str:
    """`p0` to `p3` for a gain, `m1` to `m3` for a loss."""
    size = sum(abs(gain) >= edge for edge in GAINS)
    return f"{'p' if gain >= 0 or size == 0 else 'm'}{size}"


def _tip(
    explanation: Explanation, token: ExplainedToken, looks: Mapping[str, Look], styles: Mapping[str, str]
) -> list[str]:
    acting = [_acting(expert, looks, styles) for expert in token.experts]
    rows = "".join(acting) or tag("span", "no expert acted", class_="tip-note")
    facts = [f"margin {token.margin:.2f}"]
    if token.loss is not None:
        facts.append(f"loss {token.loss:.2f}")
    if token.loss_backbone is not None:
        facts.append(f"backbone {token.loss_backbone:.2f}")
    if token.loss_without is not None:
        facts.append(f"without {explanation.without} {token.loss_without:.2f}")
    return [
        tag("span", tag("bdi", escape(shown_name(token.text, token.token))), class_="tip-head"),
        tag("span", rows, class_="tip-rows"),
        tag("span", *(tag("span", escape(fact)) for fact in facts), class_="tip-facts"),
    ]


def shown_name(text: str, token: str) -> str:
    """A token in one short line, its blanks and breaks drawn as signs."""
    text = visible(text) or token
    text = text.replace(" ", "\u00b7").replace("\n", "\u21b5").replace("\t", "\u21e5")
    return text if len(text) <= 40 else text[:39] + "\u2026"


def _acting(acting: ActingExpert, looks: Mapping[str, Look], styles: Mapping[str, str]) -> str:
    bar = tag("i", style=f"width:{100 * acting.share:.1f}%", class_=styles.get(acting.expert, "none"))
    return "".join(
        (
            tag("b", escape(looks[acting.expert].label), class_=f"key {styles.get(acting.expert, 'none')}"),
            tag("bdi", escape(acting.expert), class_="tip-name"),
            tag("span", bar, class_="meter"),
            tag("span", f"weight {acting.weight:.2f}"),
            tag("span", f"adds {100 * acting.contribution:.1f}%"),
        )
    )


def runs(tokens: Sequence[ExplainedToken]) -> list[tuple[str | None, str]]:
    """Neighbouring tokens with one leader, joined: `(leader, text)`."""
    starts = [0, *(place + 1 for place, (a, b) in enumerate(pairwise(tokens)) if a.leader != b.leader), len(tokens)]
    return [
        (tokens[start].leader, "".join(token.text for token in tokens[start:end]))
        for start, end in pairwise(starts)
        if start < end
    ]
