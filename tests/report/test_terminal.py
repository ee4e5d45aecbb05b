"""The explanation in a terminal, with colour and without."""

import io

import pytest
from rich.console import Console

from mixwright.report.terminal import print_explanation

from .hand import explanation


def printed(colour: bool, **console: object) -> str:
    out = io.StringIO()
    system = "truecolor" if colour else None
    print_explanation(explanation(), Console(file=out, width=100, force_terminal=True, color_system=system, **console))  # type: ignore[arg-type]
    return out.getvalue()


def test_with_colour_each_run_of_tokens_has_its_experts_background() -> None:
    text = printed(colour=True)
    assert "\x1b[38;2;23;24;26;48;2;98;180;242mPermission is" in text  # licence: ink on the first hue
    assert "[Li]" not in text


def test_without_colour_labels_mark_each_run() -> None:
    text = printed(colour=False)
    assert "\x1b[38" not in text and "\x1b[48" not in text
    assert "[Li]Permission is" in text and "[Ya]" in text and "[Cp]" in text


def test_no_color_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    text = printed(colour=True)
    assert "[Li]Permission is" in text and "48;2" not in text


def test_says_what_the_left_out_expert_is_worth() -> None:
    text = printed(colour=False)
    assert "without licence, this passage costs +0.25 nats per token" in text
    assert "1.00 nats per token, against 2.00 of the backbone alone" in text
    assert "weight 0.33  adds 15.0%" in text


def test_a_text_cannot_drive_the_terminal() -> None:
    out = io.StringIO()
    hostile = explanation(["[red]x", "y\x1b[2J"], ("\x1b[2J", "\x07[bold]", "\u202e"))
    print_explanation(hostile, Console(file=out, width=100, color_system=None, force_terminal=True))
    assert "\x1b[2J" not in out.getvalue() and "\x07" not in out.getvalue() and "\u202e" not in out.getvalue()
    assert "[bold]" in out.getvalue() and "[red]x" in out.getvalue()
