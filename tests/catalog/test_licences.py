"""What licences say and ask: expressions read strictly, duties united, unions that don't go together told in words."""

import random
import re

import pytest

from mixwright.catalog.licence_terms import DUTIES, SPELLINGS, TERMS, WORDS
from mixwright.catalog.licences import conflicts, read_expression, united
from mixwright.errors import CatalogError


@pytest.mark.parametrize(
    ("text", "spdx"),
    [
        ("Apache-2.0", "Apache-2.0"),
        ("APACHE-2.0", "Apache-2.0"),
        ("  apache 2.0 ", "Apache-2.0"),
        ("mit or apache-2.0", "MIT OR Apache-2.0"),
        ("(MIT)", "MIT"),
        ("MIT AND (Apache-2.0 OR ISC)", "(MIT AND Apache-2.0) OR (MIT AND ISC)"),
        ("GPL-2.0+ with Classpath-exception-2.0", "GPL-2.0-or-later WITH Classpath-exception-2.0"),
        ("gpl-3.0", "GPL-3.0-only"),
        ("cc-by-nc-4.0", "CC-BY-NC-4.0"),
        ("openrail++", "LicenseRef-openrail++"),
        ("LLaMA3", "LicenseRef-llama3"),
        ("LicenseRef-Acme", "LicenseRef-Acme"),
        ("DocumentRef-x:LicenseRef-Acme", "DocumentRef-x:LicenseRef-Acme"),
        ("MIT OR MIT", "MIT"),
    ],
)
def test_an_expression_is_read_in_any_case(text: str, spdx: str) -> None:
    read = read_expression(text)
    assert read.spdx == spdx
    assert read_expression(read.spdx) == read


@pytest.mark.parametrize("name", sorted(TERMS))
def test_every_known_licence_reads_back_and_its_duties_have_words(name: str) -> None:
    read = read_expression(name.upper() if not name.startswith("LicenseRef-") else name)
    assert read.spdx == name
    assert read.duties == TERMS[name]
    assert all(WORDS[duty] for duty in read.duties)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("unknown", "says nothing"),
        ("Other", "says nothing"),
        ("", "expected"),
        ("gpl", "several licences"),
        ("cc", "several licences"),
        ("Apache-2.1", "did you mean Apache-2.0"),
        ("Freebie", "LicenseRef-NAME"),
        ("MIT Apache-2.0", "no licence known"),
        ("MIT, Apache-2.0", "no licence known"),
        ("MIT/Apache-2.0", "no licence known"),
        ("MIT OR", "ends where"),
        ("(MIT", "ends where"),
        ("(MIT OR ISC MIT", "not closed"),
        ("MIT)", "left over"),
        ("AND", "no licence known"),
        ("((((((((((MIT))))))))))", "brackets"),
        ("MIT WITH a/b", "exception"),
        (" AND ".join(["(MIT OR ISC)"] * 7), "choices"),
        (
            " OR ".join(f"LicenseRef-{i}" for i in range(54))
            + " OR (MIT OR ISC) AND (X11 OR MIT-0) AND (0BSD OR NCSA)"
            + " OR WTFPL OR Zlib OR X11 OR 0BSD",
            "choices",
        ),
        ("x" * 1001, "characters"),
    ],
)
def test_what_is_no_licence_is_refused_in_words(text: str, says: str) -> None:
    with pytest.raises(CatalogError, match=f"^LICENCE here: .*{says}") as refusal:
        read_expression(text, "here")
    assert len(str(refusal.value)) <= 400


def test_nothing_else_comes_out_of_a_mangled_expression() -> None:
    draw = random.Random(0)
    pieces = [*SPELLINGS, "AND", "OR", "WITH", "(", ")", "+", "\0", "LicenseRef-", "other", "é", "-or-later"]
    read = 0
    for _ in range(4000):
        text = draw.choice(("", " ")).join(draw.choice(pieces) for _ in range(draw.randrange(8)))
        try:
            found = read_expression(text)
        except CatalogError as refusal:
            assert refusal.code == "LICENCE"
            assert len(str(refusal)) <= 400
        else:
            read += 1
            assert read_expression(found.spdx) == found
            assert set(found.duties) <= set(DUTIES)
    assert read > 100


def test_duties_are_united_in_one_order() -> None:
    assert united([("naming", "attribution"), ("notice",), ("attribution",)]) == ("attribution", "notice", "naming")
    assert read_expression("MIT OR GPL-3.0-only").duties == ("attribution", "notice", "share-alike")
    assert read_expression("LicenseRef-Acme").duties == ("terms of its own",)
    assert read_expression("CC-BY-NC-ND-4.0").duties == ("attribution", "non-commercial", "no derivatives")


@pytest.mark.parametrize(
    ("licences", "components", "says"),
    [
        (("MIT", "Apache-2.0"), None, ""),
        (("MIT", "CC-BY-NC-4.0"), None, ""),
        (("CC-BY-SA-4.0", "CC-BY-4.0"), None, ""),
        (("GPL-3.0-only", "Apache-2.0"), None, ""),
        (("GPL-2.0-or-later", "GPL-3.0-only"), None, ""),
        (("CC-BY-SA-4.0", "GPL-3.0-only"), None, ""),
        (("llama3.1", "Apache-2.0"), None, ""),
        (("llama3", "llama3.1"), None, ""),
        (("MIT OR GPL-2.0-only", "Apache-2.0"), None, ""),
        (("CC-BY-NC-ND-4.0", "MIT"), ("a",), "does not let what is made from a be passed on"),
        (("GPL-2.0-only", "Apache-2.0"), ("a", "b"), "can't both be met"),
        (("Apache-2.0", "GPL-2.0-only"), ("a", "b"), "can't both be met"),
        (("GPL-2.0-only", "GPL-3.0-or-later"), ("a", "b"), "can't both be met"),
        (("GPL-3.0-only", "CC-BY-NC-4.0"), ("a", "b"), "no further restrictions.*non-commercial"),
        (("openrail", "AGPL-3.0-only"), ("a", "b"), "adds use restrictions"),
        (("CC-BY-SA-4.0", "CC-BY-NC-SA-4.0"), ("a", "b"), "adds non-commercial"),
        (("CC-BY-SA-4.0", "GPL-2.0-only"), ("a", "b"), "each ask that the whole"),
        (("llama3", "MIT"), ("a", "b"), "other than Llama, such as b"),
        (("llama3.1", "gemma"), ("a", "b"), "how the whole is named"),
    ],
)
def test_unions_that_do_not_go_together_are_told(
    licences: tuple[str, ...], components: tuple[str, ...] | None, says: str
) -> None:
    found = conflicts({name: read_expression(text) for name, text in zip("ab", licences, strict=True)})
    if components is None:
        assert found == ()
    else:
        assert found[0].components == components
        assert re.search(says, found[0].why)


def test_a_choice_is_taken_so_that_it_fits() -> None:
    both = {"a": read_expression("GPL-2.0-only OR MIT"), "b": read_expression("Apache-2.0")}
    assert conflicts(both) == ()
    assert conflicts({**both, "a": read_expression("GPL-2.0-only AND MIT")})
