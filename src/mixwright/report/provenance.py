"""Where a composed model comes from: the part of every page that a reader can check."""

from collections.abc import Mapping, Sequence
from typing import Any

from mixwright.report.markup import escape, tag

_COLUMNS = (("id", "Expert"), ("source", "Source"), ("revision", "Revision"), ("licence", "Licence"), ("sha256", "SHA-256"))


def provenance(composition: Mapping[str, Any]) -> str:
    """Method, settings, backbone with its fingerprint, and every expert with its source and licence."""
    lines = [("Method", composition.get("method") or "not recorded")]
    lines += [(f"Backbone {key}", value) for key, value in _flat(composition.get("backbone") or {}).items()]
    lines += [(key, value) for key, value in _flat(composition.get("config") or {}).items()]
    listed = "".join(tag("div", tag("dt", escape(k)), tag("dd", tag("bdi", escape(v)))) for k, v in lines)
    return tag(
        "section",
        tag("h2", "Where it comes from"),
        tag("dl", listed, class_="provenance"),
        _experts(composition.get("experts") or ()),
    )


def _experts(experts: Sequence[Mapping[str, Any]]) -> str:
    columns = [(key, name) for key, name in _COLUMNS if any(expert.get(key) for expert in experts)]
    if not columns:
        return ""
    head = tag("tr", *(tag("th", escape(name), scope="col") for _, name in columns))
    rows = [
        tag("tr", *(tag("td", tag("bdi", escape(_short(key, expert.get(key))))) for key, _ in columns)) for expert in experts
    ]
    table = tag("table", tag("thead", head), tag("tbody", *rows), class_="words")
    return tag("div", table, class_="wide", tabindex="0")


def _short(key: str, value: Any) -> str:
    if value is None or value == "":
        return "unknown" if key == "licence" else ""
    return str(value)[:16] + "\u2026" if key == "sha256" and len(str(value)) > 17 else str(value)


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{before}{key}.")
        elif value is not None and value != "":
            flat[f"{before}{key}"] = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return flat
