"""The licences that are known by name, and what each asks in words. Data, not legal advice."""

from collections.abc import Iterator, Mapping
from typing import Literal, get_args

Duty = Literal[
    "attribution",
    "notice",
    "share-alike",
    "non-commercial",
    "use restrictions",
    "no derivatives",
    "naming",
    "gated",
    "other models",
    "terms of its own",
]
"""What a licence may ask of who passes a model on, in the order in which it is listed."""

DUTIES: tuple[Duty, ...] = get_args(Duty)

WORDS: Mapping[Duty, str] = {
    "attribution": "keep the copyright notices and pass on the text of the licence",
    "notice": "say what was changed, and keep the notices that came with it",
    "share-alike": "what is made from it is passed on under the same licence, with its source where that asks so",
    "non-commercial": "no commercial use",
    "use restrictions": "uses that its terms forbid stay forbidden, and its terms are passed on",
    "no derivatives": "what is made from it must not be passed on",
    "naming": "its terms say how what is made from it is named or credited",
    "gated": "whoever fetches it must accept its terms first",
    "other models": "neither it nor its output may be used to improve other language models",
    "terms of its own": "its terms are not known here: read them",
}

_BY: tuple[Duty, ...] = ("attribution",)
_CHANGES: tuple[Duty, ...] = ("attribution", "notice")
_SHARE: tuple[Duty, ...] = (*_CHANGES, "share-alike")
_RAIL: tuple[Duty, ...] = (*_CHANGES, "use restrictions")
_NAMED: tuple[Duty, ...] = (*_RAIL, "naming", "gated")

_SPDX: tuple[tuple[str, tuple[Duty, ...]], ...] = (
    ("0BSD CC0-1.0 MIT-0 Unlicense WTFPL PDDL-1.0", ()),
    ("MIT BSD-2-Clause BSD-3-Clause BSD-3-Clause-Clear ISC Zlib NCSA PostgreSQL BSL-1.0 MS-PL X11 PSF-2.0", _BY),
    ("HPND OLDAP-2.8 CDLA-Permissive-1.0 CDLA-Permissive-2.0 ODC-By-1.0", _BY),
    ("Apache-2.0 ECL-2.0 AFL-3.0 Artistic-2.0 OpenMDW-1.0 etalab-2.0", _CHANGES),
    ("CC-BY-1.0 CC-BY-2.0 CC-BY-2.5 CC-BY-3.0 CC-BY-4.0", _CHANGES),
    ("CC-BY-SA-1.0 CC-BY-SA-2.0 CC-BY-SA-2.5 CC-BY-SA-3.0 CC-BY-SA-4.0", _SHARE),
    ("GPL-1.0-only GPL-1.0-or-later GPL-2.0-only GPL-2.0-or-later GPL-3.0-only GPL-3.0-or-later", _SHARE),
    ("LGPL-2.0-only LGPL-2.0-or-later LGPL-2.1-only LGPL-2.1-or-later LGPL-3.0-only LGPL-3.0-or-later", _SHARE),
    ("AGPL-3.0-only AGPL-3.0-or-later", _SHARE),
    ("MPL-2.0 EPL-1.0 EPL-2.0 EUPL-1.1 EUPL-1.2 OSL-3.0 CDLA-Sharing-1.0 ODbL-1.0 LGPLLR OFL-1.1 CECILL-2.1", _SHARE),
    ("GFDL-1.2-only GFDL-1.2-or-later GFDL-1.3-only GFDL-1.3-or-later", _SHARE),
    ("CC-BY-NC-1.0 CC-BY-NC-2.0 CC-BY-NC-2.5 CC-BY-NC-3.0 CC-BY-NC-4.0", (*_CHANGES, "non-commercial")),
    ("CC-BY-NC-SA-2.0 CC-BY-NC-SA-2.5 CC-BY-NC-SA-3.0 CC-BY-NC-SA-4.0", (*_SHARE, "non-commercial")),
    ("CC-BY-ND-1.0 CC-BY-ND-2.0 CC-BY-ND-2.5 CC-BY-ND-3.0 CC-BY-ND-4.0", (*_BY, "no derivatives")),
    (
        "CC-BY-NC-ND-1.0 CC-BY-NC-ND-2.0 CC-BY-NC-ND-2.5 CC-BY-NC-ND-3.0 CC-BY-NC-ND-4.0",
        (*_BY, "non-commercial", "no derivatives"),
    ),
    ("PolyForm-Noncommercial-1.0.0", (*_BY, "non-commercial")),
)

_HUB: tuple[tuple[str, tuple[Duty, ...]], ...] = (
    ("openrail openrail++ creativeml-openrail-m bigscience-openrail-m bigcode-openrail-m", _RAIL),
    ("bigscience-bloom-rail-1.0 deepseek falcon-180b-license tii-falcon-license-2.0", _RAIL),
    ("llama2 llama3", (*_NAMED, "other models")),
    ("llama3.1 llama3.2 llama3.3 llama4 gemma", _NAMED),
    ("intel-research apple-amlr fair-noncommercial-research-license", (*_RAIL, "non-commercial")),
    ("deepfloyd-if-license opt-175b", (*_RAIL, "non-commercial", "gated")),
    ("mistral-research", (*_RAIL, "non-commercial", "gated")),
    ("apple-ascl", _BY),
)

_OTHER_SPELLINGS: Mapping[str, str] = {
    "apache": "Apache-2.0",
    "apache 2": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache-2": "Apache-2.0",
    "apache2": "Apache-2.0",
    "apache2.0": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "mit license": "MIT",
    "the mit license": "MIT",
    "expat": "MIT",
    "lgpl-lr": "LGPLLR",
    "open-mdw": "OpenMDW-1.0",
    "openmdw": "OpenMDW-1.0",
    "pddl": "PDDL-1.0",
    "odc-by": "ODC-By-1.0",
    "odbl": "ODbL-1.0",
    "cc0": "CC0-1.0",
    "wtfpl": "WTFPL",
    **{f"{name}-{version}": f"{name.upper()}-{version}-only" for name in ("gpl", "lgpl", "agpl", "gfdl")
       for version in ("1.0", "1.2", "1.3", "2.0", "2.1", "3.0")
       if f"{name.upper()}-{version}-only" in " ".join(ids for ids, _ in _SPDX).split()},
}  # fmt: skip

FAMILIES = frozenset({"gpl", "lgpl", "agpl", "bsd", "cc", "cc-by", "creative commons", "gfdl", "llama", "rail"})
"""Words that name several licences, which ask different things: no claim."""

NO_CLAIM = frozenset({"", "unknown", "none", "null", "n/a", "na", "noassertion", "tbd", "todo", "unlicensed", "?"})
"""What stands where nothing is said; "other" is one of them unless a name and a text or a link come with it."""

REF = "LicenseRef-"


def _listed() -> Iterator[tuple[str, tuple[Duty, ...]]]:
    for ids, duties in _SPDX:
        yield from ((name, duties) for name in ids.split())
    for ids, duties in _HUB:
        yield from ((REF + name, duties) for name in ids.split())


TERMS: Mapping[str, tuple[Duty, ...]] = {name: tuple(d for d in DUTIES if d in duties) for name, duties in _listed()}
"""SPDX id, or LicenseRef- and the hub's name -> what it asks."""

SPELLINGS: Mapping[str, str] = {
    **{name.lower(): name for name in TERMS},
    **{name.removeprefix(REF).lower(): name for name in TERMS},
    **_OTHER_SPELLINGS,
}
"""Lower-case spelling -> the id."""


def hub_name(spdx: str) -> str | None:
    """What the hub calls a licence in a model card; None where it has no word for it."""
    if spdx.startswith(REF):
        return spdx.removeprefix(REF) if spdx in TERMS else None
    lower = spdx.lower()
    for ending in ("-only", "-or-later"):
        lower = lower.removesuffix(ending)
    return lower if spdx in TERMS else None
