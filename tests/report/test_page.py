"""The page of an explanation: exact text, nothing that runs, nothing that breaks out, nothing told by colour alone."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixwright.report.depth_view import short_depths
from mixwright.report.markup import POLICY, visible
from mixwright.report.page import explanation_page
from mixwright.report.palette import HUES, INK, LINES, NEUTRAL, PAGE, contrast, labels, looks

from .hand import EXPERTS, PIECES, TEXT, explanation
from .reading import Page

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style><script>alert(1)</script>",
    "javascript:alert(1)",
    "\u202egnp.exe\u202c\u2066",
    "nul\x00bell\x07esc\x1b[31m",
    "lone\ud800surrogate",
    "👩‍👩‍👧‍👦 and 🇪🇺",
    "a" * 5000,
    "]]><!-- -->",
    "&lt;b&gt;",
]


def test_the_explained_text_is_the_exact_text_but_for_signs_that_reorder() -> None:
    page = Page(explanation_page(explanation()))
    page.close()
    assert "".join(PIECES) == TEXT
    assert page.explained == visible(TEXT) == TEXT.replace("\u202e", "⟨202E⟩").replace("\u202c", "⟨202C⟩")


def test_every_token_has_a_tooltip_that_the_keyboard_reaches() -> None:
    source = explanation_page(explanation())
    page = Page(source)
    assert len(page.tips) == len(PIECES) == len(re.findall(r'class="tok [^"]*" tabindex="0"', source))
    assert "licence" in page.tips[1] and "weight 0.75" in page.tips[1] and "margin 0.50" in page.tips[1]
    assert "loss 1.00" in page.tips[1] and "without licence 1.25" in page.tips[1]
    described = [value for name, value in page.attributes if name == "aria-describedby"]
    assert described == [
        value for name, value in page.attributes if name == "id" and re.fullmatch(r"t\d+", value or "")
    ]


def runs_nothing(source: str) -> None:
    page = Page(source)
    page.close()
    assert not {"script", "iframe", "object", "embed", "img", "link", "base", "form", "a href"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "srcset", "srcdoc")]
    links = [value for name, value in page.attributes if name in ("href", "xlink:href", "action")]
    assert all(value and value.startswith("#") for value in links)
    assert f'content="{POLICY}"' in source
    assert "default-src 'none'" in POLICY and "script-src" not in source
    assert not re.search(r"url\(|@import|expression\(", source[source.index("<style>") : source.index("</style>")])


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_and_texts_stay_text(name: str) -> None:
    source = explanation_page(explanation([name, "other"], (name, " ", name)))
    runs_nothing(source)
    source.encode("utf-8")
    page = Page(source)
    assert page.explained == visible(f"{name} {name}")
    assert visible(name) in page.words
    assert not set("\u202e\u202c\u2066\x00\x07\x1b") & set(source)


@settings(max_examples=20, deadline=None)
@given(st.text(max_size=40), st.text(max_size=40))
def test_any_name_and_any_text_stay_text(name: str, text: str) -> None:
    source = explanation_page(explanation([name, name + "x"], (text, "\n", name)))
    runs_nothing(source)
    assert Page(source.encode("utf-8").decode("utf-8")).explained == visible(f"{text}\n{name}")


def test_is_deterministic_and_holds_what_it_promises() -> None:
    source = explanation_page(explanation())
    assert source == explanation_page(explanation())
    for words in (
        "Experts by depth",
        "Contribution norms",
        "What it was worth",
        "Where it comes from",
        "f1n9e4",
        "Apache-2.0",
    ):
        assert words in source
    assert source.count("<svg") >= 3


def test_without_losses_there_is_no_loss_section_and_no_choice_of_views() -> None:
    source = explanation_page(explanation(losses=False))
    assert "What it was worth" not in source and 'type="radio"' not in source


def test_a_pool_of_166_experts_lists_those_that_act() -> None:
    names = [f"expert-{number}" for number in range(166)]
    page = Page(explanation_page(explanation(names)))
    page.close()
    assert "6 of 166" in page.words and "expert-100" not in page.words.split("Where it comes from")[0]


def test_every_expert_is_told_by_more_than_its_colour() -> None:
    names = [f"expert-{number}" for number in range(40)] + ["expert", "Expert"]
    drawn = looks(names)
    assert len({look.label for look in drawn.values()}) == len(names)
    assert len({(drawn[name].colour, drawn[name].line) for name in names[:40]}) == len(HUES) * len(LINES)
    assert labels(["licence", "lisp", "日本", ""])["licence"] == "Li"
    assert list(labels(["expert-000", "expert-001", "expert-ab"]).values()) == ["000", "001", "Ab"]
    source = explanation_page(explanation())
    assert all(f'data-k="{labels(EXPERTS)[name]}"' in source for name in EXPERTS)


@pytest.mark.parametrize("page", [0, 1])
def test_contrast_is_enough_on_light_and_dark_pages(page: int) -> None:
    assert contrast(INK[page], PAGE[page]) >= 12
    for look in looks([f"e{number}" for number in range(len(HUES))]).values():
        assert contrast(INK[page], look.tint[page]) >= 7, look
        assert contrast(look.colour[page], PAGE[page]) >= 4.5, look
    assert contrast(NEUTRAL[page], PAGE[page]) >= 4.5
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


def test_depths_have_short_names() -> None:
    assert short_depths(["model.layers.0", "model.layers.11"]) == ["0", "11"]
    assert short_depths(["encoder.block.0", "decoder.block.0"]) == ["enc 0", "dec 0"]
