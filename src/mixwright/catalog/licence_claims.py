"""What a model's folder says of its own licence, and which of it holds: what contradicts itself is not guessed at.

A claim stands in the front matter of README.md, in a licence file, or in config.json; or a user states it. Nothing is
ever assumed: a model whose licence nobody says is refused where what it became would be passed on.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixwright.catalog.document import parse
from mixwright.catalog.licence_terms import REF
from mixwright.catalog.licence_text import copyright_lines, recognise
from mixwright.catalog.licences import Expression, read_expression
from mixwright.catalog.refusal import quote, refuse, show
from mixwright.errors import CatalogError
from mixwright.files import read_regular, sha256_bytes
from mixwright.yaml12 import parse_yaml

CARD = "README.md"
CONFIG = "config.json"
STATED = "stated"
FILES = ("README.md", "[Ll][Ii][Cc][Ee][Nn][SsCc][Ee]*", "COPYING*", "NOTICE*", "USE_POLICY*", "config.json")
"""What is read of a folder, and is to be fetched of a hub repository."""

_LIMIT = 1 << 22
_FILE_NAME = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9._\- ]{0,79}")
_FREE = frozenset({"attribution", "notice", "share-alike"})
_GATES = ("extra_gated_prompt", "extra_gated_fields", "extra_gated_heading", "gated")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One place that says something. `expression` None: what it says is no licence, and `fault` tells why."""

    source: str
    """The file, or `stated`."""
    expression: Expression | None = None
    sha256: str | None = None
    """Of the file that it was read in."""
    link: str | None = None
    """Where the terms are, as the card says."""
    fault: str | None = None
    limits: tuple[str, ...] = ()
    """Words of a licence file that narrow what its wording else allows."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """All that a folder says. `texts`: its licence and notice files by name, as they are."""

    claims: tuple[Claim, ...] = ()
    texts: Mapping[str, bytes] = field(default_factory=dict[str, bytes])
    copyrights: tuple[str, ...] = ()
    gated: bool = False


@dataclass(frozen=True, kw_only=True)
class Settled:
    """The licence that holds for one model, and where that was read."""

    expression: Expression
    source: str
    sha256: str | None = None
    link: str | None = None
    remarks: tuple[str, ...] = ()
    """What a reader should know: a claim that was stated over another, a text that is not recognised."""


def is_file_name(name: str) -> bool:
    """Whether a licence file may be passed on under this name."""
    return _FILE_NAME.fullmatch(name) is not None


def read_claims(folder: Path) -> Found:
    """The claims of a model's folder: its card, its licence files, its config. A file that can't be read is a fault."""
    names = sorted({path.name for pattern in FILES for path in folder.glob(pattern) if is_file_name(path.name)})
    files: dict[str, bytes] = {}
    claims: list[Claim] = []
    for name in names:
        if not (folder / name).is_file():
            continue  # a folder of texts, say
        try:
            files[name] = read_regular((folder / name).resolve(), _LIMIT)
        except (CatalogError, OSError) as error:
            claims.append(Claim(source=name, fault=f"{name} can't be read ({show(str(error))})"))
    card, config = files.pop(CARD, b""), files.pop(CONFIG, b"{}")
    terms = [(name, data) for name, data in files.items() if not name.startswith(("NOTICE", "USE_POLICY"))]
    front = _front_matter(card)
    claims += [*_of_card(front, card, bool(terms)), *(_of_text(*text) for text in terms), *_of_config(config)]
    rights = (line for data in files.values() for line in copyright_lines(data.decode("utf-8", "replace")))
    return Found(
        claims=tuple(claims),
        texts=files,
        copyrights=tuple(dict.fromkeys(rights)),
        gated=isinstance(front, dict) and any(front.get(key) for key in _GATES),
    )


def settle(component: str, found: Found, stated: str | None = None) -> Settled:
    """The licence of a model. A stated one holds over what its folder says, and the difference is put on record.

    Raises CatalogError (LICENCE), which says what to do: for no claim, claims that contradict each other, and what is
    no licence.
    """
    where = f"component {quote(component)}"
    says = [claim for claim in found.claims if claim.expression is not None]
    faults = tuple(claim.fault for claim in found.claims if claim.fault)
    if stated is not None:
        expression = read_expression(stated, where)
        against = [c for c in says if c.expression is not None and not _agree(expression, c.expression)]
        over = (f"stated over {c.source}, which says {c.expression.spdx}" for c in against if c.expression is not None)
        return Settled(expression=expression, source=STATED, remarks=(*over, *faults, *_narrowed(found, expression)))
    if not says:
        seen = f"no licence is known ({'; '.join(faults)})" if faults else "nothing says under which licence it is"
        raise _say_which(component, where, seen)
    first = says[0]
    held = first.expression
    assert held is not None
    for other in says[1:]:
        assert other.expression is not None
        if not _agree(held, other.expression) and not _is_part(other.expression, held):
            both = f"{first.source} says {held.spdx} and {other.source} says {other.expression.spdx}"
            raise _say_which(component, where, f"{both}, and which holds is not guessed")
    narrowed = _narrowed(found, held)
    if narrowed:
        raise _say_which(component, where, f"{first.source} says {held.spdx}, but {narrowed[0]}")
    return Settled(expression=held, source=first.source, sha256=first.sha256, link=first.link, remarks=faults)


def _say_which(component: str, where: str, seen: str) -> CatalogError:
    advice = f"State it: licences={{{quote(component)}: 'SPDX-ID'}} in the config"
    return refuse("LICENCE", where, f"{seen}. {advice}, or correct its folder.")


def _narrowed(found: Found, claimed: Expression) -> tuple[str, ...]:
    """Files whose terms forbid what the claimed licence allows."""
    if not _FREE.issuperset(claimed.duties):
        return ()
    return tuple(f"{c.source} has other terms ({', '.join(c.limits[:3])})" for c in found.claims if c.limits)


def _agree(one: Expression, two: Expression) -> bool:
    """Whether two claims name the same licences, as far as a text can tell."""
    return {term.base for term in one.terms} == {term.base for term in two.terms}


def _is_part(part: Expression, whole: Expression) -> bool:
    """Whether a licence file is the text of one of several that the card names."""
    return len(whole.terms) > 1 and {term.base for term in part.terms} <= {term.base for term in whole.terms}


def _front_matter(data: bytes) -> Any:
    text = data.decode("utf-8", "replace").removeprefix("\ufeff").replace("\r\n", "\n")
    if not text.startswith("---\n"):
        return {}
    head, closed, _ = text[4:].partition("\n---")
    if not closed:
        return "its front matter does not end"
    try:
        return parse_yaml(head, CARD)
    except ValueError as error:
        return show(str(error))


def _of_card(card: Any, data: bytes, has_text: bool) -> list[Claim]:
    if not isinstance(card, dict):
        return [Claim(source=CARD, fault=f"{CARD}: {card or 'its front matter is no mapping'}")]
    given, name, link = card.get("license", card.get("licence")), card.get("license_name"), card.get("license_link")
    if given is None:
        return []
    link = show(link, 200) if isinstance(link, str) and link else None
    try:
        expression = _expression(given, name, has_text or link is not None)
    except CatalogError as error:
        return [Claim(source=CARD, fault=f"{CARD}: {error.message}")]
    return [Claim(source=CARD, expression=expression, sha256=sha256_bytes(data), link=link)]


def _expression(given: Any, name: Any = None, readable: bool = False) -> Expression:
    """A `license` field: a word, or a list of words that all bind; `other` goes by its name."""
    listed: list[Any] = list(given) if isinstance(given, list) else [given]
    if not listed or len(listed) > 16 or not all(isinstance(one, str) for one in listed):
        raise refuse("LICENCE", CARD, f"license is {show(given)}; a name or a list of names is expected.")
    parts = [_other(name, readable) if one.strip().lower() == "other" else read_expression(one, CARD) for one in listed]
    if len(parts) == 1:
        return parts[0]
    return read_expression(" AND ".join(f"({part.spdx})" for part in parts), CARD)


def _other(name: Any, readable: bool) -> Expression:
    """Terms of a model's own: they must lie beside it or be linked, else nobody could read what binds them."""
    if not isinstance(name, str) or not name.strip():
        raise refuse("LICENCE", CARD, 'license is "other" without a license_name, which says nothing.')
    try:
        return read_expression(name, CARD)
    except CatalogError:
        plain = "".join(c if c.isascii() and (c.isalnum() or c in ".-") else "-" for c in name.strip())[:80].strip("-.")
        if not readable or not plain:
            message = f'license is "other", {quote(name)}, without a licence file or license_link to read its terms.'
            raise refuse("LICENCE", CARD, message) from None
        return read_expression(REF + plain, CARD)


def _of_config(data: bytes) -> list[Claim]:
    try:
        value = parse(data, CONFIG).get("license")
    except CatalogError:
        return []  # whoever loads the model says so
    if value is None:
        return []
    try:
        return [Claim(source=CONFIG, expression=_expression(value), sha256=sha256_bytes(data))]
    except CatalogError as error:
        return [Claim(source=CONFIG, fault=f"{CONFIG}: {error.message}")]


def _of_text(name: str, data: bytes) -> Claim:
    found = recognise(data.decode("utf-8", "replace"))
    digest = sha256_bytes(data)
    if found.spdx is None:
        fault = f"the text in {name} (SHA-256 {digest[:12]}) is no licence that is recognised; compare it"
        return Claim(source=name, fault=fault, sha256=digest, limits=found.limits)
    try:
        return Claim(source=name, expression=read_expression(found.spdx, name), sha256=digest)
    except CatalogError as error:
        return Claim(source=name, fault=f"{name}: {error.message}", sha256=digest)
