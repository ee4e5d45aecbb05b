"""One self-contained page of a found hybrid: what it is, whether it is worth it, and why it is as it is."""

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from mixwright.evaluation.hybrid import HybridExplanation
from mixwright.report.hybrid_ground import boundaries_section, ground_section
from mixwright.report.hybrid_map import map_section, missing_section, slices_section, worth_section
from mixwright.report.hybrid_paths import paths_section
from mixwright.report.hybrid_words import GLOSSARY, verdict_sentences
from mixwright.report.markup import document, escape, table, tag
from mixwright.report.palette import looks, palette_rules
from mixwright.report.provenance import provenance

_LICENCES = ("component", "spdx", "revision", "source")

_AS_THEY_STAND = (
    "Components alone are measured as they stand inside the hybrid; where training changed them there, that may be "
    "less than what they might have become alone."
)


def hybrid_page(found: HybridExplanation) -> str:
    """The page as one string of HTML: no script, no file beside it, nothing from the network."""
    names = [component.name for component in found.components]
    drawn = looks(names)
    styles = {name: f"x{place}" for place, name in enumerate(names)}
    short = {name: look.label for name, look in drawn.items()}
    body = [
        tag("a", "Skip to the hybrid", href="#map", class_="skip"),
        tag("header", *_headline(found), class_="page"),
        tag(
            "main",
            map_section(found, drawn, styles),
            worth_section(found),
            slices_section(found),
            paths_section(found.trajectories, styles, short),
            ground_section(found, styles),
            boundaries_section(found),
            _cost_section(found.cost),
            _licence_section(found),
            missing_section(found.missing),
            _glossary(),
            provenance(found.composition),
            class_="page",
        ),
    ]
    style = files("mixwright.report").joinpath("hybrid_page.css").read_text(encoding="utf-8")
    rules = palette_rules({styles[name]: drawn[name] for name in names})
    return document("What this hybrid is made of, and why", body, style + rules)


def _headline(found: HybridExplanation) -> list[str]:
    first, *others = verdict_sentences(found)
    facts = [("components", f"{len(found.components)}"), ("blocks", f"{max(len(found.slots) - 2, 0)}")]
    if found.systems and found.best is not None:
        facts += [("loss of the hybrid", f"{found.systems[0].loss:.3f}")]
        facts += [("loss of the best component alone", f"{found.best.loss:.3f}")]
    if found.texts is not None:
        facts += [("texts", f"{found.texts.documents:,}"), ("tokens", f"{found.texts.tokens:,}")]
    where = "" if found.texts is None else f"Measured on {', '.join(found.texts.files)}. {_AS_THEY_STAND}"
    return [
        tag("p", "mixwright explain", class_="kicker"),
        tag("h1", "What this hybrid is made of, and why"),
        tag("p", escape(first), class_="lede verdict"),
        *(tag("p", escape(text), class_="lede") for text in others),
        tag("p", escape(where), class_="note measured") if where else "",
        tag("dl", *(tag("div", tag("dt", escape(k)), tag("dd", escape(v))) for k, v in facts), class_="facts"),
    ]


def _cost_section(cost: Sequence[tuple[str, str, str]]) -> str:
    title = tag("h2", "What it costs")
    if not cost:
        return tag("section", title, tag("p", "No figures were at hand.", class_="note"), id="cost")
    lines = [
        tag("tr", tag("th", escape(name), scope="row"), tag("td", escape(amount)), tag("td", escape(remark)))
        for name, amount, remark in cost
    ]
    drawn = tag("table", tag("tbody", *lines), class_="cost")
    return tag("section", title, tag("div", drawn, class_="wide", tabindex="0"), id="cost")


def _licence_section(found: HybridExplanation) -> str:
    title = tag("h2", "Licences")
    if not found.licences:
        note = "No ledger was at hand. Without one, nothing here says what may be done with the hybrid."
        return tag("section", title, tag("p", note, class_="note"), id="licences")
    columns = [*_LICENCES, *dict.fromkeys(key for row in found.licences for key in row if key not in _LICENCES)]
    shown = [column for column in columns if any(row.get(column) not in (None, "", [], {}) for row in found.licences)]
    lines = [
        tag("tr", *(tag("td", tag("bdi", escape(_said(row.get(column))))) for column in shown))
        for row in found.licences
    ]
    drawn = tag("div", table([column.replace("_", " ").capitalize() for column in shown], lines), class_="words")
    duties = tag("ul", *(tag("li", escape(text)) for text in found.obligations), class_="reasons")
    whole = tag("h3", "What follows for the hybrid") + duties if found.obligations else ""
    return tag("section", title, drawn, whole, id="licences")


def _said(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _glossary() -> str:
    words = (tag("div", tag("dt", escape(word)), tag("dd", escape(meaning))) for word, meaning in GLOSSARY)
    return tag("section", tag("h2", "Words"), tag("dl", *words, class_="glossary"), id="words")
