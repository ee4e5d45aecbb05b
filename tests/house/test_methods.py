"""Methods are found by listing a folder or an entry point; the sixth one touches nothing else."""

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from mixwright import methods
from mixwright.methods import base
from mixwright.methods.base import Method, load, names

CARD = '''
from dataclasses import dataclass
from mixwright.methods.base import Method, Paper

@dataclass(frozen=True)
class Config:
    """Settings."""
    beta: float = 0.5
    """beta, section 2."""

METHOD = Method(name="{name}", summary="sixth", config=Config,
                paper=Paper(title="T", authors="A", year=2026, arxiv="2600.00001", bibtex="@misc{{sixth}}"))
'''


@pytest.fixture
def sixth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `sixth` beside the methods that are there, as a person would add it."""
    folder = tmp_path / "sixth"
    folder.mkdir()
    (folder / "__init__.py").write_text('"""The sixth."""\n')
    (folder / "config.py").write_text(CARD.format(name="sixth"))
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    yield folder
    for module in [name for name in sys.modules if name.startswith("mixwright.methods.sixth")]:
        del sys.modules[module]


def test_phatgoose_is_there() -> None:
    assert "phatgoose" in names() and load("phatgoose").paper.arxiv == "2402.05859"


def test_every_method_has_a_card_that_is_its_own() -> None:
    for name in names():
        card = load(name)
        assert card.name == name and card.summary and card.paper.bibtex.startswith("@")


@pytest.mark.usefixtures("sixth")
def test_the_sixth_method_touches_one_folder(capsys: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    from mixwright.cli import build

    assert "sixth" in names() and load("sixth").config().beta == 0.5
    run = CliRunner().invoke
    assert "sixth" in run(build(), ["methods"]).output
    assert run(build(), ["cite", "sixth"]).output == "@misc{sixth}\n"
    assert "beta: 0.5" in run(build(), ["schema", "sixth"]).output


def test_a_card_under_another_name_is_refused(sixth: Path) -> None:
    (sixth / "config.py").write_text(CARD.format(name="other"))
    with pytest.raises(TypeError, match="methods/sixth/config.py: expected a Method named 'sixth'"):
        load("sixth")


def test_another_package_adds_a_method_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Method(name="theirs", summary="s", config=dict, paper=load("phatgoose").paper)
    monkeypatch.setattr(sys.modules[__name__], "THEIRS", card, raising=False)
    point = EntryPoint("theirs", f"{__name__}:THEIRS", base.ENTRY_POINTS)
    monkeypatch.setattr(base, "entry_points", lambda group: [point] if group == base.ENTRY_POINTS else [])
    assert "theirs" in names() and load("theirs") is card


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'phatgoose'"):
        load("phatgose")
    with pytest.raises(ValueError, match="there are: .*phatgoose"):
        load("zzz")
