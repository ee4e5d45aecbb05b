"""Where a composed model comes from: the part of every page that a reader can check."""

from collections.abc import Mapping, Sequence
from typing import Any

from mixwright.report.markup import escape, tag

_COLUMNS = ("Expert", "Task", "Licence", "Source", "Revision", "SHA-256")
_WEIGHTS = "adapter_model.safetensors"


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
    rows = [_row(expert) for expert in experts]
    columns = [name for name in _COLUMNS if any(row[name] for row in rows)]
    if not columns:
        return ""
    head = tag("tr", *(tag("th", escape(name), scope="col") for name in columns))
    lines = [tag("tr", *(tag("td", tag("bdi", escape(row[name]))) for name in columns)) for row in rows]
    return tag(
        "div", tag("table", tag("thead", head), tag("tbody", *lines), class_="words"), class_="wide", tabindex="0"
    )


def _row(expert: Mapping[str, Any]) -> dict[str, str]:
    """An expert's card, or as much of one as was recorded, as cells."""
    given = expert.get("source")
    source = given if isinstance(given, Mapping) else {"name": given, "revision": expert.get("revision")}
    digest = expert.get("sha256") or (expert.get("files") or {}).get(_WEIGHTS, {}).get("sha256") or ""
    named = " ".join(str(source[key]) for key in ("kind", "name") if source.get(key))
    cells = (expert.get("id"), expert.get("task"), expert.get("licence") or "unknown", named, source.get("revision"))
    return dict(zip(_COLUMNS, [str(cell or "") for cell in cells] + [_shortened(str(digest))], strict=True))


def _shortened(digest: str) -> str:
    return digest[:16] + "\u2026" if len(digest) > 17 else digest


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{before}{key}.")
        elif value is not None and value != "":
            flat[f"{before}{key}"] = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return flat
