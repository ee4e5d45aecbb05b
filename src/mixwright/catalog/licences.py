"""What a licence claim says and asks: SPDX expressions read strictly, duties united, unions that don't go together.

Nothing here is legal advice: it repeats, in words, what well-known licences ask of who passes a model on.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product
from math import prod

from mixwright.catalog.licence_terms import DUTIES, FAMILIES, NO_CLAIM, REF, SPELLINGS, TERMS, Duty, hub_name
from mixwright.catalog.refusal import quote, refuse
from mixwright.errors import CatalogError

NOT_LEGAL_ADVICE = "not legal advice"

_MAX_TEXT = 1000
_MAX_CHOICES = 64
_TOKEN = re.compile(r"\s*([()]|[^\s()]+)")
_OWN = re.compile(r"(?:DocumentRef-[A-Za-z0-9.\-]+:)?LicenseRef-[A-Za-z0-9.+_\-]{1,100}")
_EXCEPTION = re.compile(r"[A-Za-z0-9.\-]{1,80}")


@dataclass(frozen=True)
class Term:
    """One licence of an expression, with the exception that it was given under, if any."""

    id: str
    exception: str | None = None

    def __str__(self) -> str:
        return self.id if self.exception is None else f"{self.id} WITH {self.exception}"

    @property
    def duties(self) -> tuple[Duty, ...]:
        """What it asks; of terms that are not known here: that they be read."""
        return TERMS.get(self.id, ("terms of its own",))

    @property
    def base(self) -> str:
        """The id without -only or -or-later, which the text of a licence does not tell apart."""
        return self.id.removesuffix("-only").removesuffix("-or-later")


@dataclass(frozen=True)
class Expression:
    """An SPDX expression: one of `choices` may be taken, and all terms of it then bind."""

    spdx: str
    choices: tuple[tuple[Term, ...], ...]

    @property
    def terms(self) -> tuple[Term, ...]:
        """Every licence that is named in it, once, in order."""
        return tuple(dict.fromkeys(term for choice in self.choices for term in choice))

    @property
    def duties(self) -> tuple[Duty, ...]:
        """What is asked, at most: of a choice that has not been made, all that any alternative asks."""
        return united(term.duties for term in self.terms)

    @property
    def hub_name(self) -> str | None:
        """What the hub calls it, where it is one plain licence that the hub has a word for."""
        plain = len(self.terms) == 1 and self.terms[0].exception is None
        return hub_name(self.terms[0].id) if plain else None


def united(duties: Iterable[Iterable[Duty]]) -> tuple[Duty, ...]:
    """The union, in the order of `DUTIES`."""
    found = {duty for some in duties for duty in some}
    return tuple(duty for duty in DUTIES if duty in found)


def read_expression(text: str, where: str = "licence") -> Expression:
    """An SPDX id or expression, or a licence by the hub's name, in any case.

    `MIT OR Apache-2.0`, `GPL-2.0-or-later WITH Classpath-exception-2.0`, `llama3`, `LicenseRef-Acme`. Raises
    CatalogError (LICENCE) for what says nothing (`unknown`, `other`), names a family of licences, or is not known.
    """
    if len(text) > _MAX_TEXT:
        raise refuse("LICENCE", where, f"{len(text)} characters are no licence; at most {_MAX_TEXT} are read.")
    plain = " ".join(text.split())
    if plain.lower() in SPELLINGS:
        term = Term(SPELLINGS[plain.lower()])
        return Expression(str(term), ((term,),))
    tokens = [match[1] for match in _TOKEN.finditer(plain)]
    if len(tokens) > 1 and not any(token.upper() in ("AND", "OR", "WITH") or token in "()" for token in tokens):
        raise _unknown(plain, where)
    reader = _Reader(tokens, where)
    choices = reader.any_of()
    if reader.rest:
        raise refuse("LICENCE", where, f"{quote(plain)} is no SPDX expression: {quote(reader.rest[0])} is left over.")
    return Expression(_written(choices), choices)


class _Reader:
    """Recursive descent over `OR` < `AND` < `WITH` < brackets, into alternatives of terms."""

    def __init__(self, tokens: list[str], where: str) -> None:
        self.rest = tokens
        self.where = where
        self._depth = 0

    def any_of(self) -> tuple[tuple[Term, ...], ...]:
        found = [*self._all_of()]
        while self._next_is("OR"):
            found += self._all_of()
        if len(found) > _MAX_CHOICES:
            raise self._many()
        return tuple(dict.fromkeys(found))

    def _all_of(self) -> tuple[tuple[Term, ...], ...]:
        parts = [self._one()]
        while self._next_is("AND"):
            parts.append(self._one())
            if prod(map(len, parts)) > _MAX_CHOICES:
                raise self._many()
        joined = (tuple(dict.fromkeys(term for choice in chosen for term in choice)) for chosen in product(*parts))
        return tuple(dict.fromkeys(joined))

    def _one(self) -> tuple[tuple[Term, ...], ...]:
        token = self._take()
        if token == "(":
            self._depth += 1
            if self._depth > 8:
                raise refuse("LICENCE", self.where, "brackets stand in more than 8 others; write it more simply.")
            inside = self.any_of()
            if self._take() != ")":
                raise refuse("LICENCE", self.where, "a bracket is opened and not closed.")
            self._depth -= 1
            return inside
        known = _known(token, self.where)
        if not self._next_is("WITH"):
            return ((Term(known),),)
        exception = self._take()
        if not _EXCEPTION.fullmatch(exception):
            raise refuse("LICENCE", self.where, f"{quote(exception)} is no name of an exception.")
        return ((Term(known, exception),),)

    def _next_is(self, word: str) -> bool:
        if self.rest and self.rest[0].upper() == word:
            self.rest = self.rest[1:]
            return True
        return False

    def _take(self) -> str:
        if not self.rest:
            raise refuse("LICENCE", self.where, "the expression ends where a licence is expected.")
        token, self.rest = self.rest[0], self.rest[1:]
        return token

    def _many(self) -> CatalogError:
        return refuse("LICENCE", self.where, f"it leaves more than {_MAX_CHOICES} choices; state the one you take.")


def _known(token: str, where: str) -> str:
    """The id that a word means."""
    lower = token.lower()
    if lower in SPELLINGS:
        return SPELLINGS[lower]
    if lower.endswith("+") and f"{lower[:-1]}-or-later" in SPELLINGS:
        return SPELLINGS[f"{lower[:-1]}-or-later"]
    if _OWN.fullmatch(token):
        return token
    raise _unknown(token, where)


def _unknown(text: str, where: str) -> CatalogError:
    lower = text.lower()
    if lower in NO_CLAIM or lower == "other":
        return refuse(
            "LICENCE", where, f"{quote(text)} says nothing, and no licence is ever assumed. State its SPDX id."
        )
    if lower in FAMILIES:
        return refuse("LICENCE", where, f"{quote(text)} names several licences, which ask different things; name one.")
    near = get_close_matches(lower, SPELLINGS, n=1, cutoff=0.75)
    advice = f"did you mean {SPELLINGS[near[0]]}?" if near else "an SPDX id such as Apache-2.0 is expected."
    return refuse(
        "LICENCE", where, f"{quote(text)} is no licence known here; {advice} For terms of its own: {REF}NAME."
    )


def _written(choices: tuple[tuple[Term, ...], ...]) -> str:
    several = len(choices) > 1
    texts = (" AND ".join(map(str, choice)) for choice in choices)
    return " OR ".join(f"({text})" if several and " AND " in text else text for text in texts)


@dataclass(frozen=True)
class Conflict:
    """Licences that do not go together in one model, and why, in a sentence."""

    components: tuple[str, ...]
    why: str


def conflicts(components: Mapping[str, Expression]) -> tuple[Conflict, ...]:
    """What speaks against passing on one model made of all these components; empty where nothing known does.

    Of licences that leave a choice, the choices with the fewest conflicts are taken.
    """
    names = tuple(components)
    best: tuple[Conflict, ...] | None = None
    for at, taken in enumerate(product(*(components[name].choices for name in names))):
        found = _of_choice(dict(zip(names, taken, strict=True)))
        if best is None or len(found) < len(best):
            best = found
        if not found or at >= 4096:
            break
    return best or ()


def _of_choice(taken: Mapping[str, Sequence[Term]]) -> tuple[Conflict, ...]:
    found: list[Conflict] = []
    flat = [(name, term) for name, terms in taken.items() for term in terms]
    for name, term in flat:
        if "no derivatives" in term.duties:
            found.append(Conflict((name,), f"{term} does not let what is made from {name} be passed on, as this is."))
        others = [other for other, of in taken.items() if other != name and not all(map(_is_llama, of))]
        if "other models" in term.duties and others:
            why = f"{term} forbids using {name} to improve models other than Llama, such as {', '.join(others)}."
            found.append(Conflict((name, *others), why))
    for at, (one, first) in enumerate(flat):
        for other, second in flat[at + 1 :]:
            why = _why_not(first, second)
            if why is not None:
                found.append(Conflict(tuple(dict.fromkeys((one, other))), why))
    return tuple(dict.fromkeys(found))


def _is_llama(term: Term) -> bool:
    return term.id.startswith(f"{REF}llama")


def _why_not(one: Term, two: Term) -> str | None:
    """Why two terms can't both be met by one model."""
    for first, second in ((one, two), (two, one)):
        if "share-alike" not in first.duties:
            continue
        added = [d for d in ("non-commercial", "use restrictions") if d in second.duties and d not in first.duties]
        if added:
            return f"{first} allows no further restrictions, and {second} adds {' and '.join(added)}."
        if first.id == "GPL-2.0-only" and second.base in ("Apache-2.0", "GPL-3.0", "LGPL-3.0", "AGPL-3.0"):
            return f"{first} and {second} can't both be met by one work, by the Free Software Foundation's list."
    if "share-alike" in one.duties and "share-alike" in two.duties and not _flows(one, two) and not _flows(two, one):
        return f"{one} and {two} each ask that the whole be under it."
    if "naming" in one.duties and "naming" in two.duties and _is_llama(one) != _is_llama(two):
        return f"{one} and {two} each say how the whole is named."
    return None


_INTO: Mapping[str, tuple[str, ...]] = {
    "GPL-2.0": ("GPL-3.0", "AGPL-3.0"),  # of -or-later alone, see below
    "GPL-3.0": ("AGPL-3.0",),
    "LGPL-2.0": ("LGPL-2.1", "GPL-2.0", "LGPL-3.0", "GPL-3.0", "AGPL-3.0"),
    "LGPL-2.1": ("GPL-2.0", "LGPL-3.0", "GPL-3.0", "AGPL-3.0"),
    "LGPL-3.0": ("GPL-3.0", "AGPL-3.0"),
    "MPL-2.0": ("GPL-2.0", "LGPL-2.1", "LGPL-3.0", "GPL-3.0", "AGPL-3.0"),
    "EUPL-1.2": ("GPL-2.0", "GPL-3.0", "LGPL-2.1", "LGPL-3.0", "AGPL-3.0", "MPL-2.0", "OSL-3.0", "EPL-1.0"),
    "CC-BY-SA-4.0": ("GPL-3.0",),
    "CC-BY-SA-3.0": ("CC-BY-SA-4.0",),
    "CC-BY-NC-SA-3.0": ("CC-BY-NC-SA-4.0",),
}


def _flows(one: Term, two: Term) -> bool:
    """Whether a work under `one` may be passed on under `two`."""
    if one.base == two.base:
        return True
    later_needed = one.base == "GPL-2.0" and one.id.endswith("-only")
    return two.base in _INTO.get(one.base, ()) and not later_needed
