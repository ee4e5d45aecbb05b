"""The licence ledger of a model made of several: whose weights are in it, under which terms, and where that was read.

It says what it found, in words, and is not legal advice. A component whose licence nobody says is refused here, which
is where a model is saved, published or inspected; composing and running one asks for none.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mixwright.backbones.hf import fetch
from mixwright.catalog.document import parse, render
from mixwright.catalog.licence_claims import FILES, STATED, Found, Settled, is_file_name, read_claims, settle
from mixwright.catalog.licence_terms import WORDS, Duty
from mixwright.catalog.licences import (
    NOT_LEGAL_ADVICE,
    Conflict,
    Expression,
    conflicts,
    read_expression,
    united,
)
from mixwright.catalog.refusal import Faults, quote, refuse
from mixwright.errors import CatalogError
from mixwright.files import read_regular, sha256_bytes

LEDGER = "ledger.json"
NOTICE = "NOTICE"
TEXTS = "licences"
FORMAT = 1
_LIMIT = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Component:
    """A pretrained model that stands in another: where it came from, and what of it is used."""

    name: str
    path: str
    """Folder or hub id; empty for one that was built in memory."""
    fingerprint: str
    revision: str | None = None
    architecture: str = ""
    used: tuple[str, ...] = ()
    """The slots in which it acts, such as `blocks.0` and `head`."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One component with its licence. `texts`: its licence and notice files by name, to be passed on with it."""

    component: Component
    licence: Settled
    gated: bool = False
    copyrights: tuple[str, ...] = ()
    texts: Mapping[str, bytes] = field(default_factory=dict[str, bytes])

    @property
    def duties(self) -> tuple[Duty, ...]:
        """What its licence asks, and whether whoever fetches it has to accept terms."""
        return united((self.licence.expression.duties, ("gated",) if self.gated else ()))


@dataclass(frozen=True)
class Ledger:
    """The components of one model, each with its licence; `duties` and `conflicts` are those of all together."""

    entries: tuple[Entry, ...]

    @property
    def duties(self) -> tuple[Duty, ...]:
        """What at least one component asks."""
        return united(entry.duties for entry in self.entries)

    @property
    def conflicts(self) -> tuple[Conflict, ...]:
        """Licences that do not go together in one model."""
        return conflicts({entry.component.name: entry.licence.expression for entry in self.entries})

    @property
    def expression(self) -> Expression:
        """What holds for the whole: every component's licence, joined by AND."""
        parts = dict.fromkeys(entry.licence.expression.spdx for entry in self.entries)
        return read_expression(" AND ".join(f"({part})" for part in parts), "all components")

    def only(self, names: Sequence[str]) -> "Ledger":
        """The ledger of what is left when other components are cut away."""
        return Ledger(tuple(entry for entry in self.entries if entry.component.name in names))

    def plain(self) -> dict[str, Any]:
        """As `ledger.json` has it."""
        return {
            "format": FORMAT,
            "note": f"what was found, {NOT_LEGAL_ADVICE}",
            "licence": self.expression.spdx,
            "obligations": list(self.duties),
            "conflicts": [{"components": list(found.components), "why": found.why} for found in self.conflicts],
            "components": [_plain(entry) for entry in self.entries],
        }

    def text(self) -> str:
        """For people: the components, what they ask, and what does not go together."""
        return "\n".join(_lines(self)) + "\n"

    def notice(self) -> str:
        """The NOTICE file: who made what is in it, under which terms, with the notices that came along."""
        return "\n\n".join(("This model is made of parts of others:", *map(_attribution, self.entries))) + "\n"

    def files(self) -> dict[str, bytes]:
        """What goes beside a saved model, by its path in the folder."""
        texts = {
            f"{TEXTS}/{at}-{name}": data for at, entry in enumerate(self.entries) for name, data in entry.texts.items()
        }
        return {LEDGER: render(self.plain()), NOTICE: self.notice().encode(), **texts}

    def metadata(self) -> dict[str, Any]:
        """The hub's `license`, and where it has no word for it, the name and place of what holds."""
        one = {entry.licence.expression.spdx for entry in self.entries}
        word = self.entries[0].licence.expression.hub_name if len(one) == 1 else None
        if word is not None:
            return {"license": word}
        return {"license": "other", "license_name": self.expression.spdx, "license_link": LEDGER}


def open_ledger(
    components: Sequence[Component], stated: Mapping[str, str] | None = None, known: Mapping[str, Entry] | None = None
) -> Ledger:
    """The ledger of these components: stated licences hold, else what each one's folder or repository says of itself.

    `known`: entries of before, for components whose folder is no longer looked at. Raises ValueError for a stated
    component that there is not, CatalogError (LICENCE) for every one whose licence is unknown, at once.
    """
    stated, known = dict(stated or {}), known or {}
    names = [component.name for component in components]
    for name in stated:
        if name not in names:
            near = get_close_matches(name, names, n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names)}"
            raise ValueError(f"licences.{name}: no component is called so; {advice}")
    faults = Faults("licences")
    entries: list[Entry] = []
    for component in components:
        try:
            entries.append(_entry(component, stated.get(component.name), known.get(component.name)))
        except CatalogError as error:
            faults.add(error.code, f"{error.where}: {error.message}")
    faults.check()
    return Ledger(tuple(entries))


def _entry(component: Component, stated: str | None, known: Entry | None) -> Entry:
    if known is not None and (stated is None or known.licence.source == STATED):
        same = stated is None or read_expression(stated).spdx == known.licence.expression.spdx
        if same:
            return replace(known, component=component)
    found = _found(component)
    return Entry(
        component=component,
        licence=settle(component.name, found, stated),
        gated=found.gated,
        copyrights=found.copyrights,
        texts=found.texts,
    )


def _found(component: Component) -> Found:
    """What its folder says; nothing where it was built in memory, or can't be reached."""
    if not component.path:
        return Found()
    try:
        return read_claims(fetch(component.path, component.revision, FILES))
    except CatalogError:
        return Found()


def _plain(entry: Entry) -> dict[str, Any]:
    component, licence = entry.component, entry.licence
    return {
        "name": component.name,
        "id": component.path or None,
        "revision": component.revision,
        "architecture": component.architecture,
        "hash": component.fingerprint,
        "used": list(component.used),
        "licence": licence.expression.spdx,
        "claim": {"source": licence.source, "sha256": licence.sha256, "link": licence.link},
        "remarks": list(licence.remarks),
        "gated": entry.gated,
        "copyrights": list(entry.copyrights),
        "obligations": list(entry.duties),
        "texts": {name: sha256_bytes(data) for name, data in entry.texts.items()},
    }


def read_entries(folder: Path) -> dict[str, Entry]:
    """The entries that a saved model's ledger holds, by component, for saving it again; none where it has no ledger.

    Raises CatalogError: PATH, SIZE, JSON, DUP, CONFIG, HASH, LICENCE for files that are not what was written.
    """
    if not (folder / LEDGER).is_file():
        return {}
    listed = parse(read_regular((folder / LEDGER).resolve(), _LIMIT), LEDGER)
    try:
        return {str(one["name"]): _read_entry(folder, at, one) for at, one in enumerate(listed["components"])}
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise refuse("CONFIG", LEDGER, f"it is not what was written ({quote(str(error))}).") from None


def _read_entry(folder: Path, at: int, one: Mapping[str, Any]) -> Entry:
    claim = one["claim"]
    texts: dict[str, bytes] = {}
    for name, digest in one["texts"].items():
        if not is_file_name(name):
            raise refuse("PATH", LEDGER, f"{quote(name)} is no name of a licence file.")
        try:
            texts[name] = read_regular((folder / TEXTS / f"{at}-{name}").resolve(), _LIMIT)
        except FileNotFoundError:
            raise refuse("PATH", LEDGER, f"the licence file {quote(name)} is gone from {TEXTS}/.") from None
        if sha256_bytes(texts[name]) != digest:
            raise refuse("HASH", LEDGER, f"{TEXTS}/{at}-{name} is not the file that was written.")
    component = Component(
        name=str(one["name"]),
        path=str(one["id"] or ""),
        fingerprint=str(one["hash"]),
        revision=None if one["revision"] is None else str(one["revision"]),
        architecture=str(one["architecture"]),
        used=tuple(map(str, one["used"])),
    )
    licence = Settled(
        expression=read_expression(str(one["licence"]), LEDGER),
        source=str(claim["source"]),
        sha256=claim["sha256"],
        link=claim["link"],
        remarks=tuple(map(str, one["remarks"])),
    )
    rights = tuple(map(str, one["copyrights"]))
    return Entry(component=component, licence=licence, gated=bool(one["gated"]), copyrights=rights, texts=texts)


def _lines(ledger: Ledger) -> Iterator[str]:
    for entry in ledger.entries:
        where = entry.licence.source if entry.licence.sha256 is None else f"read in {entry.licence.source}"
        yield f"{entry.component.name}: {entry.licence.expression.spdx} ({where})"
        yield from (f"  {remark}" for remark in entry.licence.remarks)
    yield f"together: {ledger.expression.spdx}"
    for duty in ledger.duties:
        asked = ", ".join(entry.component.name for entry in ledger.entries if duty in entry.duties)
        yield f"  {duty}: {WORDS[duty]} ({asked})"
    yield from (f"  does not go together: {found.why}" for found in ledger.conflicts)
    yield f"This is what was found, {NOT_LEGAL_ADVICE}."


def _attribution(entry: Entry) -> str:
    component = entry.component
    origin = component.path or "built in memory"
    at = f" at {component.revision}" if component.revision else ""
    lines = [
        f"{component.name}: {component.architecture or 'a model'}, {origin}{at}",
        f"  licence: {entry.licence.expression.spdx}",
        f"  parts used: {', '.join(component.used) or 'all'}; fingerprint {component.fingerprint}",
        *(f"  {line}" for line in entry.copyrights),
    ]
    lines += [f"  asked: {WORDS[duty]}" for duty in entry.duties]
    notices = (data for name, data in entry.texts.items() if name.upper().startswith(NOTICE))
    for data in notices:
        lines += ["", *(f"    {line}".rstrip() for line in data.decode("utf-8", "replace").splitlines())]
    return "\n".join(lines)
