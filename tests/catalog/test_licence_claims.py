"""Where a model's folder says its licence, and that nothing is guessed: odd cards, odd files, contradictions."""

import hashlib
import os
import random
from pathlib import Path

import pytest

from mixwright.catalog.licence_claims import Found, read_claims, settle
from mixwright.catalog.licence_text import recognise
from mixwright.errors import CatalogError

APACHE = (Path(__file__).parents[2] / "LICENSE").read_text()
MIT = """MIT License

Copyright (c) 2024 Jane Roe

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def folder(place: Path, **files: str | bytes) -> Path:
    for name, text in files.items():
        path = place / name.replace("_md", ".md").replace("_json", ".json").replace("__", "-")
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return place


def card(**fields: object) -> str:
    return "---\n" + "".join(f"{key}: {value}\n" for key, value in fields.items()) + "---\n# A model\n"


@pytest.mark.parametrize(
    ("text", "spdx"),
    [
        (APACHE, "Apache-2.0"),
        (APACHE.replace("http://", "https://"), "Apache-2.0"),
        (MIT, "MIT"),
        (MIT.upper(), "MIT"),
        ("SPDX-License-Identifier: CC-BY-NC-4.0\n", "CC-BY-NC-4.0"),
        ("GNU GENERAL PUBLIC LICENSE\nVersion 3, 29 June 2007\n...", "GPL-3.0-only"),
        ("GNU LESSER GENERAL PUBLIC LICENSE\nVersion 3, 29 June 2007\n", "LGPL-3.0-only"),
        ("Attribution-NonCommercial 4.0 International\n====\n", "CC-BY-NC-4.0"),
        ("META LLAMA 3 COMMUNITY LICENSE AGREEMENT\nRelease Date: April 18, 2024", "LicenseRef-llama3"),
        ("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n", "LicenseRef-llama3.1"),
        ("Gemma Terms of Use\n", "LicenseRef-gemma"),
        (MIT + "\nThe above is granted only for research.\n", None),
        (MIT + "\n“Commons Clause” License Condition v1.0\n", None),
        (APACHE.replace("royalty-free", "royalty-bearing"), None),
        (APACHE + "\nUse for non-commercial purposes.", None),
        (MIT + MIT.replace("free of charge", "for a fee"), None),
        ("You may use this model on Sundays.", None),
        ("", None),
    ],
)  # fmt: skip
def test_a_text_is_recognised_by_its_wording_or_not_at_all(text: str, spdx: str | None) -> None:
    assert recognise(text).spdx == spdx


@pytest.mark.parametrize(
    ("files", "stated", "spdx", "source"),
    [
        ({"README_md": card(license="apache-2.0")}, None, "Apache-2.0", "README.md"),
        ({"README_md": "\ufeff" + card(license="MIT").replace("\n", "\r\n")}, None, "MIT", "README.md"),
        ({"README_md": card(license="[mit, apache-2.0]")}, None, "MIT AND Apache-2.0", "README.md"),
        ({"README_md": card(license="other", license_name="llama3")}, None, "LicenseRef-llama3", "README.md"),
        (
            {"README_md": card(license="other", license_name="Acme v1", license_link="https://acme.example/l")},
            None, "LicenseRef-Acme-v1", "README.md",
        ),
        (
            {"README_md": card(license="other", license_name="acme"), "LICENSE": "You may use it, non-commercially."},
            None, "LicenseRef-acme", "README.md",
        ),
        ({"LICENSE": MIT}, None, "MIT", "LICENSE"),
        ({"COPYING": APACHE, "config_json": '{"license": "apache-2.0"}'}, None, "Apache-2.0", "COPYING"),
        ({"config_json": '{"license": "isc"}'}, None, "ISC", "config.json"),
        ({"README_md": card(license="gpl-3.0"), "LICENSE": "GNU GENERAL PUBLIC LICENSE Version 3"}, None,
         "GPL-3.0-only", "README.md"),
        ({"README_md": card(license="mit OR apache-2.0"), "LICENSE__MIT": MIT, "LICENSE__APACHE": APACHE}, None,
         "MIT OR Apache-2.0", "README.md"),
        ({}, "MIT", "MIT", "stated"),
        ({"README_md": card(license="apache-2.0")}, "MIT", "MIT", "stated"),
    ],
)  # fmt: skip
def test_a_claim_is_found_where_it_stands(
    files: dict[str, str], stated: str | None, spdx: str, source: str, tmp_path: Path
) -> None:
    place = folder(tmp_path, **files)
    held = settle("a", read_claims(place), stated)
    assert (held.expression.spdx, held.source) == (spdx, source)
    if source != "stated":
        assert held.sha256 == hashlib.sha256((place / source).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "nothing says under which licence"),
        ({"README_md": "# No front matter\n\nLicense: MIT\n"}, "nothing says"),
        ({"README_md": card(license="unknown")}, '"unknown" says nothing'),
        ({"README_md": card(license="other")}, "without a license_name"),
        ({"README_md": card(license="other", license_name="acme")}, "without a licence file or license_link"),
        ({"README_md": card(license="{a: b}")}, "a name or a list of names"),
        ({"README_md": card(license="[]")}, "a name or a list of names"),
        ({"README_md": card(license=7)}, "a name or a list of names"),
        ({"README_md": "---\nlicense: [mit\n---\n"}, "README.md"),
        ({"README_md": "---\nlicense: mit\n"}, "does not end"),
        ({"README_md": card(license="mit"), "LICENSE": APACHE}, "README.md says MIT and LICENSE says Apache-2.0"),
        ({"LICENSE__MIT": MIT, "LICENSE__APACHE": APACHE}, "which holds is not guessed"),
        ({"README_md": card(license="mit"), "config_json": '{"license": "gpl-3.0"}'}, "config.json says GPL-3.0-only"),
        ({"README_md": card(license="mit"), "LICENSE": MIT + "No commercial use: non-commercial only."}, "other terms"),
        ({"LICENSE": "You may use this model on Sundays."}, "no licence that is recognised"),
        ({"LICENSE": b"\xff\xfe\x00" * 100}, "no licence that is recognised"),
    ],
)
def test_what_says_nothing_or_two_things_is_refused_and_told_what_to_do(
    files: dict[str, str | bytes], says: str, tmp_path: Path
) -> None:
    found = read_claims(folder(tmp_path, **files))
    with pytest.raises(CatalogError, match="^LICENCE component") as refusal:
        settle("left", found)
    assert says in str(refusal.value)
    assert 'licences={"left": ' in str(refusal.value)
    assert len(str(refusal.value)) <= 400
    assert settle("left", found, "MIT").expression.spdx == "MIT"


def test_what_is_stated_over_the_folder_is_put_on_record(tmp_path: Path) -> None:
    found = read_claims(folder(tmp_path, README_md=card(license="mit"), LICENSE=APACHE))
    assert settle("a", found, "MIT").remarks == ("stated over LICENSE, which says Apache-2.0",)
    with pytest.raises(CatalogError, match="LICENCE component"):
        settle("a", found, "whatever")


def test_a_text_that_is_not_recognised_beside_a_claim_is_remarked(tmp_path: Path) -> None:
    held = settle("a", read_claims(folder(tmp_path, README_md=card(license="mit"), LICENSE="Be kind.")))
    assert held.expression.spdx == "MIT"
    assert "no licence that is recognised" in held.remarks[0]


def test_texts_rights_and_gates_come_along(tmp_path: Path) -> None:
    place = folder(
        tmp_path, README_md=card(license="mit", extra_gated_prompt="Agree!"), LICENSE=MIT, NOTICE="(c) 2023 Roe"
    )
    found = read_claims(place)
    assert found.gated
    assert set(found.texts) == {"LICENSE", "NOTICE"}
    assert found.copyrights == ("Copyright (c) 2024 Jane Roe", "(c) 2023 Roe")


def test_mangled_cards_end_in_a_claim_or_a_fault(tmp_path: Path) -> None:
    whole = card(license="other", license_name="acme", license_link="x", tags="[a, b]").encode()
    draw = random.Random(0)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(draw.randrange(1, 6)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        (tmp_path / "README.md").write_bytes(bytes(data))
        found = read_claims(tmp_path)
        assert isinstance(found, Found)
        try:
            settle("a", found)
        except CatalogError as refusal:
            assert refusal.code == "LICENCE"


def test_a_huge_card_is_no_claim_and_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "LICENSE")
    (tmp_path / "README.md").write_bytes(b"---\n" + b"x" * (1 << 23))
    with pytest.raises(CatalogError, match="can't be read"):
        settle("a", read_claims(tmp_path))
