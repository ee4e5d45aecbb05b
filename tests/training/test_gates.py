"""What a stage proves, measures and demands: frozen parameters, gates, stages that only look, and steps in time."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mixwright.training.fitted import Fitted
from mixwright.training.gates import Findings, Gate, read_findings
from mixwright.training.objectives import supervised
from mixwright.training.stage import ParamGroup

from .test_compositions import EXPERTS, added, stage, trained

PASSED = Gate(name="loss", passed=True, measured=1.0, bound=2.0, said="loss 1 <= 2.")
FAILED = Gate(name="loss", passed=False, measured=3.0, bound=2.0, said="loss 3 > 2.")


def looks(*gates: Gate) -> Any:
    return lambda model, job, quiet: Findings(record={"seen": type(model).__name__}, gates=gates)


def record(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name / "trained.json").read_text())


def test_findings_come_back_from_their_record() -> None:
    findings = Findings(record={"a": 1}, gates=(PASSED, FAILED), sentences=("so it is.",))
    assert read_findings(json.loads(json.dumps(findings.plain()))) == findings
    assert findings.failed() == (FAILED,) and findings.said().startswith("so it is.\ngate passed: loss 1 <= 2.")
    assert Findings(gates=(replace(PASSED, passed=None),)).failed()  # not measured is not passed
    assert read_findings({}) == Findings()


def test_a_failed_gate_warns_and_is_written_down(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    report = trained(tmp_path, stage("one", examine=looks(PASSED, FAILED)), stage("two"))
    assert list(report.stages) == ["one", "two"] and "gate NOT passed: loss 3 > 2." in report.stages["one"].said
    assert "stage one: loss 3 > 2." in caplog.text
    assert [gate["passed"] for gate in record(tmp_path, "one")["gates"]] == [True, False]
    assert record(tmp_path, "one")["findings"] == {"seen": "ComposedModel"}


def test_a_failed_gate_stops_what_would_build_on_it_until_it_may_warn(tmp_path: Path) -> None:
    hard = stage("one", examine=looks(FAILED), stops=True)
    for options in ({}, {"resume": True}, {"only": "two"}):  # at once; when resumed; and for a stage on its own
        with pytest.raises(ValueError, match=r"stage one: loss 3 > 2\. What it left is kept in .*one/composition"):
            trained(tmp_path, hard, stage("two"), **options)
    assert not (tmp_path / "two" / "composition").exists()
    report = trained(tmp_path, replace(hard, stops=False), stage("two"), resume=True, force=True)
    assert report.skipped == ("one",) and list(report.stages) == ["two"]


def test_a_stage_that_only_looks_leaves_a_record_and_is_done_once(tmp_path: Path) -> None:
    looked: list[bool] = []

    def look(model: Any, job: Any, quiet: bool) -> Fitted:
        looked.append(model.training)
        return Fitted(steps=0, loss=None, best=None, seconds=0.0)

    first = stage("look", leaves=False, steps=0, own_way=look, examine=looks(PASSED), groups=())
    report = trained(tmp_path / "a", first, stage("one"))
    trained(tmp_path / "b", stage("one"))
    assert added(tmp_path / "a" / "one") == added(tmp_path / "b" / "one")  # it starts afresh
    assert not (tmp_path / "a" / "look" / "composition").exists() and report.composition is not None
    assert trained(tmp_path / "a", first, stage("one"), resume=True).skipped == ("look", "one") and len(looked) == 1
    last = replace(first, name="after")
    assert list(trained(tmp_path / "a", stage("one"), last, only="after").stages) == ["after"]
    plans = trained(tmp_path / "c", first, stage("one"), last, dry_run=True).plans
    assert [plan.name for plan in plans] == ["look", "one", "after"] and [plan.trainable for plan in plans] == [
        0,
        128,
        0,
    ]


def test_what_no_group_selects_is_proved_unchanged(tmp_path: Path) -> None:
    half = ParamGroup(select=("*.experts.down",), lr=0.1)
    trained(tmp_path / "a", stage("one", groups=(half,), proves_frozen=True))
    proof = record(tmp_path / "a", "one")["frozen"]
    assert proof["parameters"] > 10 and len(proof["sha256"]) == 64

    def moves(model: Any, batch: Any) -> torch.Tensor:
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if name.endswith("experts.up")).add_(1)
        return supervised(model, batch)

    with pytest.raises(AssertionError, match=r"stage one changed .*experts\.up \(1 in all\), which must stay frozen"):
        trained(tmp_path / "b", stage("one", groups=(half,), proves_frozen=True, objective=moves))
    assert not (tmp_path / "b" / "one" / "composition").exists()


def test_groups_may_be_chosen_by_the_model_and_the_objective_by_the_data(tmp_path: Path) -> None:
    def prepared(model: Any, job: Any, quiet: bool) -> Any:
        assert len(job.data) == 4
        return lambda model, batch: 0.0 * sum(p.sum() for p in model.parameters() if p.requires_grad)

    def chosen(model: nn.Module) -> tuple[ParamGroup, ...]:
        assert any("experts.down" in name for name, _ in model.named_parameters())
        return (EXPERTS,)

    report = trained(tmp_path, stage("one", groups=(), choose_groups=chosen, prepare=prepared))
    assert report.stages["one"].losses == (0.0, 0.0)
    assert (
        trained(tmp_path / "b", stage("one", groups=(), choose_groups=chosen), dry_run=True).plans[0].trainable == 128
    )


def test_groups_take_turns(tmp_path: Path) -> None:
    turns = {
        name: replace(EXPERTS, select=(f"*.experts.{name}",), turn=(n, 2)) for n, name in enumerate(("down", "up"))
    }
    seen: list[tuple[bool, ...]] = []

    def noted(model: Any, batch: Any) -> torch.Tensor:
        seen.append(tuple(p.requires_grad for name, p in model.named_parameters() if ".experts." in name))
        return supervised(model, batch)

    trained(tmp_path, stage("one", steps=4, groups=tuple(turns.values()), objective=noted))
    assert seen == [(True, False), (False, True)] * 2
    optimizer = load_file(sorted((tmp_path / "one" / "checkpoints").glob("step-*"))[-1] / "optimizer.safetensors")
    assert {name: int(t) for name, t in optimizer.items() if name.endswith("step")} == {"0.0.step": 2, "0.1.step": 2}
