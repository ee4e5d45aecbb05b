"""The battery on families that pass and fail it, checks that crash, processes that hang or die, and the reports."""

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

import mixwright.methods.manticore.families as families
from mixwright.methods.manticore import battery
from mixwright.methods.manticore.families import (
    FamilyReport,
    Verdict,
    probe,
    probe_apart,
    read_report,
    table,
    write_report,
)

CHECKS = ["identity", "backward", "decoding", "generate", "padding", "checkpointing", "pruning"]


def report(family: str, verdict: Verdict = "supported", reason: str | None = None) -> FamilyReport:
    checks = {"identity": None, "padding": reason}
    return FamilyReport(family=family, verdict=verdict, reason=reason, checks=checks, seconds=1.5)


def test_a_good_family_holds_in_every_check() -> None:
    found = probe("llama")
    assert (found.family, found.verdict, found.reason) == ("llama", "supported", None)
    assert found.checks == dict.fromkeys(CHECKS) and found.seconds > 0


def test_a_limited_one_says_what_does_not_hold_and_why() -> None:
    found = probe("rwkv")
    assert found.verdict == "limited" and found.reason is not None
    failed = [check for check in CHECKS if found.checks[check] is not None]
    assert failed == ["decoding", "padding", "pruning"]
    assert "no cache of the kind that transformers passes on" in str(found.checks["decoding"])
    assert "the model alone" in str(found.checks["padding"])  # whose fault it is
    assert all(f"{check}: {found.checks[check]}" in found.reason for check in failed)


def test_a_folder_is_tried_with_its_own_switches(tmp_path: Path) -> None:
    written = {"model_type": "gpt_neox", "use_parallel_residual": False, "num_hidden_layers": 24, "hidden_size": 2048}
    (tmp_path / "config.json").write_text(json.dumps(written))
    found = probe(str(tmp_path))
    assert (found.family, found.verdict, list(found.checks)) == ("gpt_neox", "supported", CHECKS)


def test_a_wrong_name_is_told_the_nearest_ones() -> None:
    with pytest.raises(ValueError, match="'gpt-neoxx' is no family .* did you mean gpt_neox"):
        probe("gpt-neoxx")


def test_a_check_that_crashes_is_reported_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(bench: battery.Bench) -> str | None:
        raise RuntimeError("the roof\n  falls in")

    def note(name: str) -> Callable[[battery.Bench], None]:
        return lambda bench: ran.append(name)

    ran: list[str] = []
    after = {name: note(name) for name in ("padding", "checkpointing", "pruning")}
    monkeypatch.setattr(battery, "CHECKS", {"generate": crash, **after})
    found = probe("gpt2")
    assert found.verdict == "limited" and found.reason == "generate: it fails: the roof falls in"
    assert ran == list(after)
    monkeypatch.setattr(battery, "CHECKS", {"identity": crash, **after})
    assert probe("gpt2").verdict == "unsupported"  # without identity a family is of no use


def test_a_family_that_no_tiny_model_can_be_made_of_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    import mixwright.backbones.family as tiny

    monkeypatch.setattr(tiny, "_MOST", 10)
    found = probe("gpt2")
    assert found.verdict == "unsupported" and found.checks == {}
    assert "no tiny model of gpt2 can be made" in str(found.reason) and "parameters are left" in str(found.reason)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the injected probe is forked")
def test_one_that_hangs_or_dies_is_reported_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def injected(name: str) -> FamilyReport:
        if name == "hangs":
            time.sleep(60)
        if name == "dies":
            os._exit(7)
        if name == "wrong":
            raise ValueError("no such name")
        return report(name)

    monkeypatch.setattr(families, "probe", injected)
    monkeypatch.setattr(families.multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(families.multiprocessing, "get_context", Mock(return_value=context))
    start = time.perf_counter()
    found = list(probe_apart(["hangs", "dies", "wrong", "good"], limit=2.0))
    assert [one.verdict for one in found] == ["unsupported"] * 3 + ["supported"]
    assert found[0].reason == "no answer within 2 seconds" and time.perf_counter() - start < 30
    assert found[1].reason == "its process died (exit code 7)" and found[2].reason == "no such name"
    assert not multiprocessing.active_children()


def test_reports_are_written_and_read(tmp_path: Path) -> None:
    known = [report("b", "limited", "padding: off by a | b"), report("a")]
    path = tmp_path / "found.json"
    assert read_report(str(path)) == []
    write_report(str(path), known)
    assert read_report(str(path)) == known
    record = json.loads(path.read_text())
    assert record["counts"] == {"supported": 1, "limited": 1, "unsupported": 0}
    assert record["packages"].keys() == {"torch", "transformers"}
    assert "Supported: `a`." in table(known) and "| b | limited | padding: off by a / b |" in table(known)
    path.write_text('{"something": "else"}')
    with pytest.raises(ValueError, match="expected a report of `mixwright probe`"):
        read_report(str(path))


def test_a_table_stays_between_its_markers(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("# Before\n\ntext\n")
    write_report(str(path), [report("a")])
    first = path.read_text()
    path.write_text(first + "\nafter\n")
    write_report(str(path), [report("a"), report("b")])
    text = path.read_text()
    assert text.startswith("# Before\n\ntext\n\n<!-- families") and text.endswith("<!-- families: end -->\n\nafter\n")
    assert "2 families: 2 supported" in text and "1 families" not in text and text.count("<!--") == 2
