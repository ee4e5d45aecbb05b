"""The text with every token shaded by how sure its retrieval was, and the neurons that moved it one hover away."""

from bisect import bisect_right
from collections.abc import Sequence

from mixwright.evaluation.contribution import depth_of
from mixwright.evaluation.neuron_text import NeuronText, NeuronToken, TokenAtSite
from mixwright.evaluation.neurons import ActingNeuron
from mixwright.report.depth_view import short_depths
from mixwright.report.markup import escape, tag
from mixwright.report.text_view import gain_step, kind_of, shown_name, with_tip


def tokens_view(explained: NeuronText) -> str:
    """The streams of the text, one block each."""
    names = short_depths([depth_of(site.site) for site in explained.sites])
    quarters = _quarters([value for token in explained.tokens if (value := coverage_at(token)) is not None])
    blocks: list[str] = []
    streams = list(dict.fromkeys(token.stream for token in explained.tokens))
    for stream in streams:
        if len(streams) > 1:
            blocks.append(tag("h3", escape({"source": "Input", "target": "Answer"}.get(stream, stream))))
        drawn = [
            _token(place, token, names, quarters)
            for place, token in enumerate(explained.tokens)
            if token.stream == stream
        ]
        tail = escape(explained.tails.get(stream, ""))
        blocks.append(tag("div", *drawn, tail, class_="text", dir="auto", data_stream=stream))
    return "".join(blocks)


def coverage_at(token: NeuronToken) -> float | None:
    """The mean coverage of a token over its sites."""
    found = [one.coverage for one in token.at if one is not None and one.coverage is not None]
    return sum(found) / len(found) if found else None


def number(value: float | None) -> str:
    """Three digits, or a stroke for nothing."""
    return "-" if value is None else f"{value:.3g}"


def _quarters(values: Sequence[float]) -> list[float]:
    """The three values between the quarters of these."""
    ordered = sorted(values)
    return [ordered[len(ordered) * part // 4] for part in (1, 2, 3)] if ordered else []


def _token(place: int, token: NeuronToken, names: Sequence[str], quarters: Sequence[float]) -> str:
    covered = coverage_at(token)
    classes = ["tok", *kind_of(token)]
    if covered is not None:
        classes.append(f"q{bisect_right(quarters, covered)}")
    if token.loss is not None and token.loss_without is not None:
        classes.append(f"g{gain_step(token.loss_without - token.loss)}")
    unsure = any(one is not None and one.unsure for one in token.at)
    if unsure:
        classes.append("first")
    return with_tip(place, token, _tip(token, names), classes, "?" if unsure else None)


def _tip(token: NeuronToken, names: Sequence[str]) -> list[str]:
    rows: list[str] = []
    facts: list[str] = []
    for name, one in zip(names, token.at, strict=True):
        if one is None:
            continue
        rows += [_acting(neuron, one, name) for neuron in one.neurons] or [
            tag("span", f"layer {escape(name)}: no neuron acted", class_="tip-note")
        ]
        if one.coverage is not None:
            facts.append(f"layer {name}: coverage {100 * one.coverage:.2g}%, margin {number(one.margin)}")
        if one.unsure:
            dense = "" if not one.dense else f", dense branch {one.dense:.2f}"
            facts.append(f"{100 * one.unsure:.0f}% of heads unsure{dense}")
    if token.loss is not None:
        facts.append(f"loss {token.loss:.2f}")
    if token.loss_without is not None:
        facts.append(f"without the neurons {token.loss_without:.2f}")
    return [
        tag("span", tag("bdi", escape(shown_name(token.text, token.token))), class_="tip-head"),
        tag("span", *rows, class_="tip-rows"),
        tag("span", *(tag("span", escape(fact)) for fact in facts), class_="tip-facts"),
    ]


def _acting(neuron: ActingNeuron, one: TokenAtSite, name: str) -> str:
    part = neuron.norm / one.size if one.size > 0 else 0.0
    bar = tag("i", style=f"width:{100 * min(part, 1.0):.1f}%")
    return "".join(
        (
            tag("b", escape(f"{name}.{neuron.head}"), class_="key", title="layer and head"),
            tag("span", f"{neuron.id} ({neuron.place[0]}, {neuron.place[1]})", class_="tip-name"),
            tag("span", bar, class_="meter"),
            tag("span", f"gate {neuron.gate:.2f}"),
            tag("span", f"adds {100 * part:.0f}%"),
        )
    )
