"""The page of a text in a model of retrieved neurons: everything on it, nothing that runs."""

import io
import re

import pytest
from rich.console import Console

from mixwright.report.markup import visible
from mixwright.report.neuron_page import neuron_page
from mixwright.report.neuron_terminal import print_neuron_text

from .hand_neurons import PIECES, neuron_text
from .reading import Page
from .test_page import HOSTILE, runs_nothing


def read(source: str) -> Page:
    page = Page(source)
    page.close()
    return page


def test_is_deterministic_and_holds_what_it_promises() -> None:
    source = neuron_page(neuron_text())
    assert source == neuron_page(neuron_text())
    runs_nothing(source)
    page = read(source)
    assert page.explained == "".join(PIECES)
    for words in (
        "Layers and heads",
        "layers.0.mlp 3 × 4",
        "3 of 12",
        "head 1",
        "Sub-keys",
        "Neurons of layers.1.mlp",
        "Where retrieval was least sure",
        "Flagged heads, 20% of all",
        "save 3.00 nats per token",
        "f1n9e4",
    ):
        assert words in page.words, words


def test_a_token_says_who_moved_it_how_sure_and_what_was_done() -> None:
    page = read(neuron_page(neuron_text()))
    assert len(page.tips) == len(PIECES)
    for words in ("7 (1, 3)", "gate 0.60", "adds 50%", "adds 25%", "0.1", "layer 0: coverage 40%, margin 0.25"):
        assert words in page.tips[1], words
    assert "100% of heads unsure, dense branch 0.12" in page.tips[1] and "unsure" not in page.tips[0]


def test_the_least_sure_quarter_is_darkest_and_flags_have_a_sign() -> None:
    source = neuron_page(neuron_text())
    found = re.findall(r'class="(tok[^"]*)"[^>]*?(data-k="\?")?[^>]*? aria-describedby', source)
    shades = [next(c for c in classes.split() if re.fullmatch("q[0-3]", c)) for classes, _ in found]
    assert shades == ["q3", "q3", "q2", "q1", "q0"]
    assert source.count('data-k="?"') == 1 and " first" in found[1][0]


def test_what_was_not_measured_is_not_claimed() -> None:
    page = read(neuron_page(neuron_text(flags=False, covered=False, beside=False)))
    assert "Where retrieval was least sure" not in page.words and "coverage" not in " ".join(page.tips)
    assert "The model's loss is 1.00 nats per token." in page.words and "the neurons save" not in page.words.lower()
    sure = read(neuron_page(neuron_text(flags=False)))
    assert "No threshold is set" in sure.words and "Flagged heads" not in sure.words


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_and_sites_stay_text(name: str) -> None:
    source = neuron_page(neuron_text((name, " ", name), (name,)))
    runs_nothing(source)
    assert read(source).explained == visible(f"{name} {name}")


def test_the_terminal_tells_the_same() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    print_neuron_text(neuron_text(), console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    for words in (
        "5 tokens, 2 layers of neurons",
        "layers.0.mlp",
        "head 1",
        "7 (1, 3): 5 times, 62% of all",
        "' one' 10%",
    ):
        assert words in said, words
