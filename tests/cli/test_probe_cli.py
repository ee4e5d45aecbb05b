"""`probe` prints checks, counts and JSON, writes reports, goes on where it left off, and says with its exit code."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mixwright.backbones.hf as hf
import mixwright.methods.manticore.families as families
from mixwright.cli import build
from mixwright.methods.manticore.families import FamilyReport

KNOWN = {"gpt2": None, "rwkv": "padding: it moves", "t5": "identity: it has two halves"}
VERDICTS = {"gpt2": "supported", "rwkv": "limited", "t5": "unsupported"}


def run(*arguments: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(build(), ["probe", *arguments], catch_exceptions=False)
    assert result.exit_code == exit_code, result.output
    return result.output


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names that were probed; what is found is made up."""
    names: list[str] = []

    def found(wanted: Sequence[str], limit: float) -> Iterator[FamilyReport]:
        del limit
        for name in wanted:
            names.append(name)
            reason, verdict = KNOWN[name], VERDICTS[name]
            checks = {"identity": reason if name == "t5" else None, "padding": reason if name == "rwkv" else None}
            yield FamilyReport(family=name, verdict=verdict, reason=reason, checks=checks)  # type: ignore[arg-type]

    monkeypatch.setattr(families, "probe_apart", found)
    monkeypatch.setattr(hf, "causal_families", lambda: ("gpt2", "rwkv", "t5"))
    monkeypatch.setattr("mixwright.backbones.family.causal_families", lambda: ("gpt2", "rwkv", "t5"))
    return names


def test_a_family_is_really_probed_in_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 8, "hidden_size": 512}')
    record = json.loads(run(str(tmp_path), "--json"))
    assert record["counts"] == {"supported": 1, "limited": 0, "unsupported": 0}
    (family,) = record["families"]
    assert family.keys() == {"family", "verdict", "reason", "checks", "seconds"}
    assert family["family"] == "llama" and set(family["checks"].values()) == {None} and len(family["checks"]) == 7


def test_one_is_printed_check_by_check(asked: list[str]) -> None:
    text = run("rwkv")
    assert "it moves" in text and text.rstrip().endswith("rwkv: limited") and asked == ["rwkv"]


def test_exit_codes(asked: list[str]) -> None:
    run("t5", exit_code=3)
    run("gpt2", "t5", exit_code=3)
    run("--all")  # a table of all is no refusal
    with pytest.raises(ValueError, match="did you mean gpt2"):
        run("gpt-2")
    with pytest.raises(ValueError, match="or ask for --all"):
        run()
    with pytest.raises(ValueError, match="or ask for --all"):
        run("gpt2", "--all")
    with pytest.raises(ValueError, match="expected a file that ends in .json or .md"):
        run("gpt2", "--report", "found.txt")


def test_reports_and_going_on(asked: list[str], tmp_path: Path) -> None:
    record, page = tmp_path / "found.json", tmp_path / "README.md"
    page.write_text("# Mine\n")
    run("gpt2", "--report", str(record))
    text = run("--all", "--resume", "--report", str(record), "--report", str(page))
    assert asked == ["gpt2", "rwkv", "t5"]  # each once
    assert "3 families: 1 supported, 1 limited, 1 unsupported" in text
    assert [one["family"] for one in json.loads(record.read_text())["families"]] == ["gpt2", "rwkv", "t5"]
    assert page.read_text().startswith("# Mine\n\n<!-- families") and "| t5 | unsupported |" in page.read_text()
    run("--all", "--report", str(record))  # without --resume all over again
    assert asked[3:] == ["gpt2", "rwkv", "t5"]
