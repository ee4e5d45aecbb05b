"""Which licence a text is, told by its wording: a short licence by all of it, a long one by its title and its end."""

import re
from dataclasses import dataclass

from mixwright.files import sha256_bytes

_MIT = """permission is hereby granted free of charge to any person obtaining a copy of this software and associated
documentation files the software to deal in the software without restriction including without limitation the rights to
use copy modify merge publish distribute sublicense and or sell copies of the software and to permit persons to whom the
software is furnished to do so subject to the following conditions the above copyright notice and this permission notice
shall be included in all copies or substantial portions of the software the software is provided as is without warranty
of any kind express or implied including but not limited to the warranties of merchantability fitness for a particular
purpose and noninfringement in no event shall the authors or copyright holders be liable for any claim damages or other
liability whether in an action of contract tort or otherwise arising from out of or in connection with the software or
the use or other dealings in the software"""

_ISC = """permission to use copy modify and or distribute this software for any purpose with or without fee is hereby
granted provided that the above copyright notice and this permission notice appear in all copies the software is
provided as is and the author disclaims all warranties with regard to this software including all implied warranties of
merchantability and fitness in no event shall the author be liable for any special direct indirect or consequential
damages or any damages whatsoever resulting from loss of use data or profits whether in an action of contract negligence
or other tortious action arising out of or in connection with the use or performance of this software"""

_BSD = """redistribution and use in source and binary forms with or without modification are permitted provided that the
following conditions are met (1 )?redistributions of source code must retain the above copyright notice this list of
conditions and the following disclaimer (2 )?redistributions in binary form must reproduce the above copyright notice
this list of conditions and the following disclaimer in the documentation and or other materials provided with the
distribution (?P<names>(3 )?neither the names? of .{0,120}? may be used to endorse or promote products derived from this
software without specific prior written permission )?this software is provided by .{0,120}? as is and any express or
implied warranties including but not limited to the implied warranties of merchantability and fitness for a particular
purpose are disclaimed in no event shall .{0,120}? be liable for any direct indirect incidental special exemplary or
consequential damages including but not limited to procurement of substitute goods or services loss of use data or
profits or business interruption however caused and on any theory of liability whether in contract strict liability or
tort including negligence or otherwise arising in any way out of the use of this software even if advised of the
possibility of such damage"""

_BODIES = (
    ("MIT", re.compile(" ".join(_MIT.split()))),
    ("ISC", re.compile(" ".join(_ISC.split()))),
    ("BSD-2-Clause", re.compile(" ".join(_BSD.split()))),
)
_BESIDE = 80
_ADDS = re.compile(
    r"\b(must|may not|shall|only|prohibit\w*|restrict\w*|except|provided|licensed under|license version)\b"
)
_APACHE = "apache license version 2 0 january 2004 "
_APACHE_END = "end of terms and conditions"
_APACHE_SHA256 = "30e4fead14bea27559ab87df4b7e795f30238bd249aae20bc792ba6615939d57"

_TITLES = (
    ("AGPL-3.0-only", r"gnu affero general public license version 3"),
    ("LGPL-3.0-only", r"gnu lesser general public license version 3"),
    ("LGPL-2.1-only", r"gnu lesser general public license version 2 1"),
    ("GPL-3.0-only", r"gnu general public license version 3"),
    ("GPL-2.0-only", r"gnu general public license version 2"),
    ("MPL-2.0", r"mozilla public license version 2 0"),
    ("CC-BY-NC-ND-4.0", r"attribution noncommercial noderivatives 4 0 international"),
    ("CC-BY-NC-SA-4.0", r"attribution noncommercial sharealike 4 0 international"),
    ("CC-BY-NC-4.0", r"attribution noncommercial 4 0 international"),
    ("CC-BY-ND-4.0", r"attribution noderivatives 4 0 international"),
    ("CC-BY-SA-4.0", r"attribution sharealike 4 0 international"),
    ("CC-BY-4.0", r"(creative commons|^)( legal code)? ?attribution 4 0 international"),
    ("CC0-1.0", r"cc0 1 0 universal"),
    ("Unlicense", r"this is free and unencumbered software released into the public domain"),
    ("LicenseRef-llama2", r"llama 2 community license agreement"),
    ("LicenseRef-llama3.1", r"llama 3 1 community license agreement"),
    ("LicenseRef-llama3.2", r"llama 3 2 community license agreement"),
    ("LicenseRef-llama3.3", r"llama 3 3 community license agreement"),
    ("LicenseRef-llama4", r"llama 4 community license agreement"),
    ("LicenseRef-llama3", r"llama 3 community license agreement"),
    ("LicenseRef-gemma", r"gemma terms of use"),
    ("LicenseRef-bigscience-bloom-rail-1.0", r"bigscience rail license v ?1 0"),
    ("LicenseRef-bigcode-openrail-m", r"bigcode (open ?rail m|openrail m)"),
    ("LicenseRef-creativeml-openrail-m", r"creativeml open ?rail m"),
    ("LicenseRef-bigscience-openrail-m", r"bigscience open ?rail m"),
)
_TITLE_WITHIN = 600

_LIMITS = re.compile(
    r"\bnon ?commercial\b|\bcommons clause\b|\bresearch (use|purposes) only\b|\bacceptable use policy\b"
    r"|\badditional restrictions\b|\bfollowing additional\b|\bno derivatives\b"
)
_PERMISSIVE = frozenset({None, "MIT", "ISC", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "CC0-1.0", "Unlicense"})
_TAG = re.compile(r"SPDX-License-Identifier:\s*([^\r\n]{1,200})")
_COPYRIGHT = re.compile(r"^\W{0,4}(?:copyright\b|©|\(c\) ).{0,160}$", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Recognised:
    """What a licence's text is. `spdx` None: not known. `limits`: words in it that a permissive licence has not."""

    spdx: str | None
    limits: tuple[str, ...] = ()


def recognise(text: str) -> Recognised:
    """The licence that a text is, if its wording says so; one tag `SPDX-License-Identifier:` says it as well."""
    tags = {found.strip() for found in _TAG.findall(text)}
    words = _words(text)
    spdx = tags.pop() if len(tags) == 1 else _by_wording(words)
    limits = tuple(dict.fromkeys(match[0] for match in _LIMITS.finditer(words)))
    return Recognised(None, limits) if limits and spdx in _PERMISSIVE else Recognised(spdx)


def copyright_lines(text: str) -> tuple[str, ...]:
    """The lines that name who holds the rights, without forms that nobody filled in; at most 50."""
    lines = (" ".join(match[0].split()).strip(" #*/") for match in _COPYRIGHT.finditer(text))
    real = (line for line in lines if re.search(r"\d{4}|\(c\)|©", line, re.IGNORECASE) and "[" not in line)
    return tuple(dict.fromkeys(line for line in real if "<year>" not in line))[:50]


def _by_wording(words: str) -> str | None:
    for spdx, body in _BODIES:
        match = body.search(words)
        if match is not None:
            beside = f"{words[: match.start()]} {words[match.end() :]}"
            plain = len(beside.split()) <= _BESIDE and not _ADDS.search(beside)
            named = "BSD-3-Clause" if match.groupdict().get("names") else spdx
            return named if plain else None
    if words.startswith(_APACHE):
        body = re.sub(r"^https? www apache org licenses ", "", words.removeprefix(_APACHE)).partition(_APACHE_END)[0]
        return "Apache-2.0" if sha256_bytes(body.encode()) == _APACHE_SHA256 else None
    for spdx, title in _TITLES:
        if re.search(title, words[:_TITLE_WITHIN]):
            return spdx
    return None


def _words(text: str) -> str:
    return " ".join(re.sub(r"[^a-z0-9]+", " ", text.lower()).split())
