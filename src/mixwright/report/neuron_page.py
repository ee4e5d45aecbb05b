"""One self-contained page of a text in a model that retrieves single neurons: who fired, how sure, how evenly."""

from collections.abc import Sequence
from importlib.resources import files

from mixwright.evaluation.contribution import depth_of
from mixwright.evaluation.neuron_text import HeadUse, NeuronText, NeuronToken, SiteText
from mixwright.report.depth_view import short_depths
from mixwright.report.markup import document, escape, table, tag
from mixwright.report.neuron_tokens import number, tokens_view
from mixwright.report.provenance import provenance
from mixwright.report.svg import sparkline


def neuron_page(explained: NeuronText) -> str:
    """The page as one string of HTML: no script, no file beside it, nothing from the network."""
    names = short_depths([depth_of(site.site) for site in explained.sites])
    body = [
        tag("a", "Skip the text", href="#heads", class_="skip"),
        tag("header", *_headline(explained), class_="page"),
        tag(
            "main",
            _text_section(explained),
            _heads_section(explained.sites),
            _axes_section(explained.sites),
            *(_busiest_section(explained, site) for site in explained.sites),
            _unsure_section(explained, names),
            provenance(explained.composition),
            class_="page",
        ),
    ]
    style = files("mixwright.report").joinpath("neuron_page.css").read_text(encoding="utf-8")
    return document("Which neuron fired on which token", body, style)


def _headline(explained: NeuronText) -> list[str]:
    slots, tokens = sum(site.slots for site in explained.sites), len(explained.tokens)
    whole = sum(site.grid[0] * site.grid[1] for site in explained.sites)
    used = sum(site.used for site in explained.sites)
    covered = coverage_of(explained)
    facts = [("tokens", f"{tokens:,}"), ("neurons in the tables", f"{whole:,}"), ("retrievals", f"{slots:,}")]
    facts += [("different neurons", f"{used:,}")]
    facts += [] if covered is None else [("coverage", f"{100 * covered:.2g}%")]
    facts += [] if (share := unsure_share(explained)) is None else [("heads that were unsure", f"{100 * share:.2g}%")]
    return [
        tag("p", "mixwright explain", class_="kicker"),
        tag("h1", "Which neuron fired on which token"),
        tag("p", *_worth(explained), class_="lede"),
        tag("dl", *(tag("div", tag("dt", escape(k)), tag("dd", escape(v))) for k, v in facts), class_="facts"),
    ]


def coverage_of(explained: NeuronText) -> float | None:
    """The share of the softmax over all experts that was retrieved: mean over tokens, heads and sites."""
    found = [head.coverage for site in explained.sites for head in site.heads if head.coverage is not None]
    return sum(found) / len(found) if found else None


def unsure_share(explained: NeuronText) -> float | None:
    """The share of heads that were flagged, where something flags."""
    found = [head.unsure for site in explained.sites for head in site.heads if head.unsure is not None]
    return sum(found) / len(found) if found else None


def _worth(explained: NeuronText) -> list[str]:
    loss, without = explained.mean_loss(), explained.mean_loss("loss_without")
    if loss is None:
        return ["This backbone predicts no tokens, so there is no loss to tell."]
    if without is None:
        return [f"The model's loss is {loss:.2f} nats per token."]
    verb = "save" if loss <= without else "cost"
    return [f"The neurons {verb} {abs(without - loss):.2f} nats per token beside the layers of the backbone."]


def _text_section(explained: NeuronText) -> str:
    shown = [("sure", "Least sure")] if coverage_of(explained) is not None else []
    shown += [("gain", "What the neurons save")] if explained.mean_loss("loss_without") is not None else []
    views = [
        tag("input", type="radio", name="view", id=f"v-{name}", checked=True if place == 0 else None)
        + tag("label", escape(label), for_=f"v-{name}")
        for place, (name, label) in enumerate(shown)
        if len(shown) > 1
    ]
    note = (
        "The darker a token, the smaller the share of all experts' softmax that was retrieved for it, in quarters of "
        "this text; a question mark stands before tokens with an unsure head, where thresholds are set. "
        if coverage_of(explained) is not None
        else ""
    )
    how = "Point at a token, or reach it with the tab key, to see which neurons moved it."
    return tag(
        "section", tag("h2", "The text"), tag("p", note + how, class_="note"), *views, tokens_view(explained),
        class_="reading",
    )  # fmt: skip


def _heads_section(sites: Sequence[SiteText]) -> str:
    lines = [_site_line(site) for site in sites]
    head = ("Layer and head", "Retrievals", "Different neurons", "Amount to", "Coverage", "Entropy", "Margin", "Unsure")
    drawn: list[str] = []
    for site, line in zip(sites, lines, strict=True):
        drawn.append(line)
        drawn += [_head_line(place, one) for place, one in enumerate(site.heads)]
    words = (
        "Amount to: the number of evenly used neurons with the same entropy of gate mass. Coverage: the share of the "
        "softmax over all experts that was retrieved. Entropy: of that softmax, in nats. Margin: the last retrieved "
        "score over the best one left."
    )
    return tag("section", tag("h2", "Layers and heads"), tag("p", words, class_="note"), table(head, drawn), id="heads")


def _site_line(site: SiteText) -> str:
    whole = site.grid[0] * site.grid[1]
    name = tag("th", tag("bdi", escape(site.site)), tag("small", f" {site.grid[0]} \u00d7 {site.grid[1]}"), scope="row")
    cells = [f"{site.slots:,}", f"{site.used:,} of {whole:,}", f"{site.effective:,.0f}"]
    means = [
        _mean([getattr(head, name) for head in site.heads]) for name in ("coverage", "entropy", "margin", "unsure")
    ]
    return tag("tr", name, *(tag("td", cell) for cell in cells), *_measures(*means), class_="whole")


def _head_line(place: int, head: HeadUse) -> str:
    name = tag("th", f"head {place}", scope="row", class_="inner")
    cells = (tag("td", f"{head.slots:,}"), tag("td", f"{head.used:,}"), tag("td", ""))
    return tag("tr", name, *cells, *_measures(head.coverage, head.entropy, head.margin, head.unsure))


def _measures(
    coverage: float | None, entropy: float | None, margin: float | None, unsure: float | None
) -> tuple[str, ...]:
    shown = ("-" if coverage is None else f"{100 * coverage:.2g}%", number(entropy), number(margin))
    return tuple(tag("td", cell) for cell in (*shown, "-" if unsure is None else f"{100 * unsure:.2g}%"))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _axes_section(sites: Sequence[SiteText]) -> str:
    def axis(counts: Sequence[int], title: str) -> str:
        return sparkline([float(count) for count in counts], float(max(counts, default=0)), "seg", title)

    lines = [
        tag(
            "tr",
            tag("th", tag("bdi", escape(site.site)), scope="row"),
            *(
                tag("td", axis(counts, f"{site.site}, {name} axis"), class_="axis-cell")
                + tag("td", f"{sum(count == 0 for count in counts)} of {len(counts)}")
                for name, counts in (("first", site.first), ("second", site.second))
            ),
        )
        for site in sites
    ]
    note = "How this text's retrievals spread over the sub-keys of each axis; neighbouring sub-keys share a column."
    head = ("Layer", "First axis", "Empty", "Second axis", "Empty")
    return tag("section", tag("h2", "Sub-keys"), tag("p", note, class_="note"), table(head, lines))


def _busiest_section(explained: NeuronText, site: SiteText) -> str:
    lines = [
        tag(
            "tr",
            tag(
                "th", tag("code", f"{neuron.id}"), tag("small", f" ({neuron.place[0]}, {neuron.place[1]})"), scope="row"
            ),
            tag("td", f"{neuron.count}"),
            tag("td", f"{100 * neuron.share:.2g}%"),
            tag("td", tag("ul", *(_chip(explained.tokens[at]) for at in neuron.tokens), class_="chips")),
        )
        for neuron in site.busiest
    ]
    note = "The neurons that added most to this layer's outputs, and the tokens on which each added most."
    head = ("Neuron", "Acted", "Part of all", "Fires on")
    title = tag("h2", "Neurons of ", tag("bdi", escape(site.site)))
    return tag("section", title, tag("p", note, class_="note"), table(head, lines), class_="busiest")


def _chip(token: NeuronToken) -> str:
    return tag("li", tag("code", tag("bdi", escape(token.text.strip() or token.token))))


def _unsure_section(explained: NeuronText, names: Sequence[str]) -> str:
    """The tokens with the least coverage, and what was done about it."""
    covered = [
        (one.coverage, one, place, token)
        for token in explained.tokens
        for place, one in enumerate(token.at)
        if one is not None and one.coverage is not None
    ]
    if not covered:
        return ""
    worst = sorted(covered, key=lambda found: found[0])[:10]
    lines = [
        tag(
            "tr",
            tag("th", tag("code", tag("bdi", escape(token.text.strip() or token.token))), scope="row"),
            tag("td", escape(names[place])),
            tag("td", f"{100 * coverage:.2g}%"),
            tag("td", number(one.margin)),
            tag("td", "-" if one.unsure is None else f"{100 * one.unsure:.0f}%"),
            tag("td", number(one.dense)),
        )
        for coverage, one, place, token in worst
    ]
    flagged = unsure_share(explained)
    said = (
        "No threshold is set, so nothing was done about it; coverage_thresholds and flag_unsure set some."
        if flagged is None
        else f"Flagged heads, {100 * flagged:.2g}% of all, were given the fallback that is set."
    )
    head = ("Token", "Layer", "Coverage", "Margin", "Unsure heads", "Dense branch")
    return tag(
        "section", tag("h2", "Where retrieval was least sure"), tag("p", said, class_="note"), table(head, lines)
    )
