"""The page of a hybrid: every sentence on it was measured, nothing runs, and odd hybrids have a page too."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from mixwright.evaluation.intervals import Interval
from mixwright.report.hybrid_page import hybrid_page
from mixwright.report.hybrid_terminal import print_hybrid
from mixwright.report.hybrid_words import (
    GLOSSARY,
    amount,
    left_out_sentences,
    reasons,
    signed,
    slot_name,
    sweep_sentence,
    verdict_sentences,
)
from mixwright.report.lines import Line, Mark, line_chart
from mixwright.report.markup import visible

from .hand_hybrid import gap, hybrid
from .reading import Page
from .test_page import HOSTILE, runs_nothing


def read(source: str) -> Page:
    page = Page(source)
    page.close()
    return page


def test_is_deterministic_and_holds_what_it_promises() -> None:
    source = hybrid_page(hybrid())
    assert source == hybrid_page(hybrid())
    runs_nothing(source)
    page = read(source)
    found = hybrid()
    for words in (
        *verdict_sentences(found),
        *(text for _, text in reasons(found)),
        *left_out_sentences(found),
        *found.missing,
        *(word for word, _ in GLOSSARY),
        "measured as they stand inside the hybrid",
        "Block 3",
        "layers 2\u20133",
        "Tiny1ForCausalLM, width 65, 100,001 parameters",
        "Stage search",
        "Did not move: Embedding, Block 1, Block 2, Block 3, Head.",
        "mean of 3 runs",
        "top eigenvalue",
        "Two rows against each other",
        "mamba is least itself in embedding: likeness 0.80",
        "3,012,480",
        "Apache-2.0",
        "9b7a01",
        "Keep the notices of neox and mamba.",
        "Where it comes from",
        "f1n9e4",
    ):
        assert words in page.words, words


def test_the_verdict_comes_first_and_has_its_numbers() -> None:
    page = hybrid_page(hybrid(better=-0.05))
    first = "The hybrid is better than the best of its components, neox: 3.100 nats per token against 3.150 "
    assert page.index("verdict") < page.index("<h2") and first in read(page).words
    assert "(difference \u22120.050, 95 % interval \u22120.070 to \u22120.030, 64 texts)" in read(page).words


@pytest.mark.parametrize(
    ("better", "wide", "words"),
    [
        (0.05, 0.02, "The hybrid is worse than the best of its components, neox"),
        (-0.01, 0.02, "No significant difference between the hybrid and the best of its components, neox"),
        (0.0, 0.0, "3.100 nats per token against 3.100, the same on every text."),
    ],
)
def test_every_verdict_can_be_given(better: float, wide: float, words: str) -> None:
    assert words in verdict_sentences(hybrid(better=better, wide=wide))[0]


def test_no_verdict_without_texts() -> None:
    bare = hybrid(texts=None, systems=[], slices=[], counterfactuals=[], left_out=[], boundaries=[], sweeps=[])
    bare = replace(bare, grid=None, flatness=None, trajectories=[], cost=[], licences=[])
    page = read(hybrid_page(bare))
    assert "No text was given, so nothing here says whether the hybrid is any good." in page.words
    assert "better" not in "".join(verdict_sentences(bare)) and "--runs RUN" in page.words
    assert page.words.count("Not measured") >= 4 and "No ledger was at hand" in page.words
    assert "NaN" not in page.words and "None" not in page.words


def test_comparisons_of_elsewhere_are_told_from_their_numbers_alone() -> None:
    one = {"system": "the hybrid", "rival": "neox", "budget": "equal tokens", "verdict": "no significant difference"}
    one |= {
        "value": -0.01,
        "low": -0.03,
        "high": 0.01,
        "n": 40,
        "seeds": [0.1, 0.2],
        "sentence": "<script>boast</script>",
    }
    said = verdict_sentences(hybrid(verdicts=[one]))
    assert said[0] == (
        "At equal tokens, the hybrid: no significant difference from neox (\u22120.010 nats per token, 95 % interval "
        "\u22120.030 to +0.010, 40 texts, 2 training runs)."
    )
    assert "boast" not in hybrid_page(hybrid(verdicts=[one]))
    odd = verdict_sentences(hybrid(verdicts=[{"value": "x", "verdict": None}]))
    assert "nan" in odd[0]


def test_reasons_are_needed_in_the_way_or_even() -> None:
    found = hybrid(blocks=1)
    base = found.counterfactuals
    row = base[0].row
    changes = {("neox", "0"): gap(0.4), ("mamba", "0"): gap(-0.3)}
    made = [replace(c, change=changes.get((c.component, c.forced), c.change)) if c.row == row else c for c in base]
    said = reasons(replace(found, counterfactuals=made))
    assert ("needs", "Embedding needs neox: without it the loss rises by 0.400 nats per token, 95 % interval 0.380 to "
            "0.420.") in said  # fmt: skip
    assert any(
        kind == "hurts" and "would do better without mamba: the loss falls by 0.300" in text for kind, text in said
    )
    even = [replace(c, change=gap(0.001)) for c in made]
    assert {kind for kind, _ in reasons(replace(found, counterfactuals=even))} == {"even"}


def test_a_component_that_is_not_used_is_said_to_be_unused() -> None:
    found = hybrid(blocks=1)
    kept = [
        replace(c, kept=True, change=gap(0.0, 0.0)) if (c.component, c.forced) in {("neox", "1"), ("mamba", "0")} else c
        for c in found.counterfactuals
    ]
    kept = [replace(c, change=gap(0.7)) if (c.component, c.forced) == ("mamba", "1") else c for c in kept]
    said = [text for _, text in reasons(replace(found, counterfactuals=kept))]
    wanted = (
        "Head does not use mamba: to use nothing else there would cost 0.700 nats per token, 95 % interval 0.680 to"
    )
    assert any(text.startswith(wanted) for text in said)
    rows = [replace(row, weights=(1.0, 0.0)) for row in found.rows]
    one = "Every row gives all the weight to neox: this hybrid is that component."
    assert one in read(hybrid_page(replace(found, rows=rows, counterfactuals=kept))).words


def test_a_sweep_says_where_the_best_is_and_how_wide_the_valley() -> None:
    one = hybrid().sweeps[0]
    flat = replace(one, losses=[3.0] * 5 + [2.995] + [3.0] * 5, chosen=0.2, chosen_loss=3.0)
    assert "0.5 is best (loss 2.995); weights from 0.0 to 1.0 are within 0.01" in sweep_sentence(flat, "Head")
    assert "The choice, 0.20, is 0.005 nats above it." in sweep_sentence(flat, "Head")
    sharp = replace(one, losses=[4.0] * 5 + [3.0] + [4.0] * 5, chosen=0.5, chosen_loss=3.0)
    assert "only that point is within" in sweep_sentence(sharp, "Head") and "level with it" in sweep_sentence(
        sharp, "x"
    )
    torn = replace(one, losses=[3.0] + [4.0] * 9 + [3.0])
    assert "2 of the 11 points are within" in sweep_sentence(torn, "Head")


@pytest.mark.parametrize(
    ("names", "blocks"), [(["only"], 1), (["a", "b", "c"], 1), (["a", "b"], 12), (["a", "b", "c"], 3)]
)
def test_any_number_of_components_and_blocks_has_a_page(names: list[str], blocks: int) -> None:
    source = hybrid_page(hybrid(names, blocks))
    runs_nothing(source)
    page = read(source)
    assert f"Block {blocks}" in page.words and all(name in page.words for name in names)
    if len(names) == 1:
        assert "there is one component, with weight 1 everywhere" in page.words
        assert "its only component, only" in page.words


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(name: str) -> None:
    found = hybrid([name, "other"])
    texts = replace(found.texts, files=[name], cut=[name])
    licences = [{"component": name, "spdx": name, "revision": None, "source": name}]
    verdicts = [{"system": name, "rival": name, "budget": name, "verdict": name, "value": 1.0, "low": 0.5, "high": 2.0}]
    source = hybrid_page(replace(found, texts=texts, licences=licences, verdicts=verdicts, obligations=[name]))
    runs_nothing(source)
    source.encode("utf-8")
    assert visible(name) in read(source).words
    assert not set("\u202e\u202c\u2066\x00\x07\x1b") & set(source)


def test_weights_that_follow_the_text_are_shown_with_their_spread() -> None:
    found = hybrid()
    rows = [replace(row, spread=(0.21, 0.21)) for row in found.rows]
    page = read(hybrid_page(replace(found, rows=rows)))
    assert "\u00b1 0.21" in page.words and "differ from token to token" in page.words


def test_rows_that_places_share_are_named_together() -> None:
    found = hybrid(blocks=1, sweeps=[], grid=None)
    both = replace(found.rows[0], slots=("embedding", "blocks.0"))
    page = read(hybrid_page(replace(found, rows=[both, found.rows[2]])))
    assert "One row for: Embedding and block 1." in page.words


def test_lines_end_in_their_labels_and_bands_are_drawn() -> None:
    lines = [
        Line("one", [0, 10], [0.5, 0.9], "x0", "On", [0.5, 0.8], [0.5, 1.0]),
        Line("other", [0, 10], [0.5, 0.9], "x1", "Ot"),
    ]
    drawn = line_chart(lines, "T<>", x_name="step", y_range=(0.0, 1.0), marks=[Mark(5, 0.7, "x0", "here")])
    assert drawn.count("<polyline") == 2 and drawn.count("<polygon") == 1 and "T&lt;&gt;" in drawn
    assert 'points="0,50 100,10"' in drawn and 'points="0,50 100,0 100,20 0,50"' in drawn
    ends = [float(y) for y in re.findall(r'y="([\d.]+)" class="at', drawn)]
    assert len(ends) == 2 and abs(ends[0] - ends[1]) >= 13
    assert "<circle" in line_chart([], "empty", x_name="x", marks=[Mark(1, 1, "x0", "a")])


def test_numbers_have_a_real_minus_and_no_sign_where_nothing_is_left() -> None:
    assert [signed(v) for v in (0.5, -0.5, -0.0001, 0.0001)] == ["+0.500", "\u22120.500", "0.000", "0.000"]
    assert amount(Interval(-0.2, -0.3, -0.1, 0.1, 9)) == "0.200 nats per token, 95 % interval 0.100 to 0.300"
    assert [slot_name(s) for s in ("embedding", "blocks.0", "blocks.x", "head")] == [
        "Embedding", "Block 1", "Blocks.x", "Head"
    ]  # fmt: skip


def printed(**more: object) -> str:
    out = io.StringIO()
    print_hybrid(hybrid(**more), Console(file=out, width=110, force_terminal=True, color_system=None))  # type: ignore[arg-type]
    return out.getvalue()


def test_the_terminal_shows_verdict_weights_reasons_and_what_is_missing() -> None:
    text = re.sub(r"\s+", " ", printed())
    assert text.startswith("The hybrid is better than the best of its components, neox")
    assert "Block 2 \u2588" in text and "logit ensemble" in text and "+ Block 2 needs mamba" in text
    assert "Not measured" in text and "another seed" in text
    assert "nothing here says" in printed(
        texts=None, systems=[], counterfactuals=[], left_out=[], sweeps=[], flatness=None
    )


def test_a_name_cannot_drive_the_terminal() -> None:
    text = printed(names=["[red]x", "y\x1b[2J\u202e"])
    assert "\x1b[2J" not in text and "\u202e" not in text and "[red]x" in text
