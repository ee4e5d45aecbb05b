"""The page of an evaluation."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mixwright.cli import build
from mixwright.evaluation.table import ORACLE
from mixwright.report.run_page import run_page

from .reading import Page
from .test_page import HOSTILE, runs_nothing


def record(system: str, value: float, metric: str = "accuracy", **more: Any) -> dict[str, Any]:
    return {
        "system": system,
        "task": "topic",
        "metric": metric,
        "value": value,
        "low": value - 0.1,
        "high": value + 0.1,
        **more,
    }


RESULTS = {
    "scores": [
        record("routed", 0.8),
        record("merged", 0.4),
        record("routed", 0.6, task="mood"),
        record("merged", 0.5, task="mood"),
        record("routed", 1.5, "nats"),
        record("merged", 1.0, "nats"),
    ],
    "routing": {"routed": {"entropy": 0.5, "margin": 0.25}},
    "cost": {"seconds": 2.5},
}


def test_names_the_best_system_and_shows_everything() -> None:
    page = Page(run_page(RESULTS))
    page.close()
    assert "routed is first of 2 systems on 2 tasks: accuracy 0.700, 0.250 ahead of merged" in page.words
    for words in ("entropy", "0.25", "seconds", "2.5", "mood", "0.700 to 0.900", "lower is better", "higher is better"):
        assert words in page.words, words


def test_lower_is_better_for_losses() -> None:
    page = Page(run_page({"scores": [row for row in RESULTS["scores"] if row["metric"] == "nats"]}))  # type: ignore[index]
    assert "merged is first" in page.words and "overlap" in page.words.split("section")[0]


def test_means_with_intervals_are_taken_as_they_were_measured() -> None:
    means = [
        {"system": s, "metric": "accuracy", "value": v, "low": v - 0.01, "high": v + 0.01}
        for s, v in (("merged", 0.9), ("routed", 0.1))
    ]
    assert "merged is first" in Page(run_page({**RESULTS, "means": means})).words


def test_reads_the_means_of_eval_and_ranks_no_reference_first() -> None:
    means = [
        {"system": system, "value": value, "stderr": 0.1, "low": value - 0.1, "high": value + 0.1, "n": 20}
        | {"minus_backbone": {"value": value - 0.5, "low": value - 0.6, "high": value - 0.4, "n": 20}}
        for system, value in ((ORACLE, 0.9), ("routed", 0.8), ("backbone", 0.5))
    ]
    rows = [record(str(mean["system"]), float(str(mean["value"]))) for mean in means]
    page = Page(run_page({"metric": "accuracy", "means": means, "scores": [record("routed", 3.0, "nats"), *rows]}))
    assert "routed is first of 2 systems on 1 task: accuracy 0.800, 0.300 ahead of backbone" in page.words
    assert "+0.300 (+0.200 to +0.400)" in page.words and "upper references" in page.words
    assert page.words.index("accuracy") < page.words.index("nats")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(name: str) -> None:
    source = run_page(
        {
            "scores": [record(name, 0.5, name, task=name)],
            name: {name: {name: name}},
            "x": [{name: name}],
            "composition": {"method": name},
        }
    )
    runs_nothing(source)
    source.encode("utf-8")


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({}, "no scores"),
        ({"scores": []}, "no scores"),
        ({"scores": [{"system": "a"}]}, "score 0"),
        ({"scores": ["a"]}, "score 0"),
    ],
)
def test_refuses_what_is_no_evaluation(results: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_page(results)


def test_report_writes_the_page(tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text(json.dumps(RESULTS))
    result = CliRunner().invoke(build(), ["report", str(tmp_path / "scores.json"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["page"] == str(tmp_path / "scores.html")
    assert (tmp_path / "scores.html").read_text("utf-8") == run_page(RESULTS)


@pytest.mark.parametrize("content", ["no json", "3", "[" * 100_000])
def test_report_refuses_other_files(tmp_path: Path, content: str) -> None:
    (tmp_path / "scores.json").write_text(content)
    result = CliRunner().invoke(build(), ["report", str(tmp_path / "scores.json")])
    assert isinstance(result.exception, ValueError) and "mixwright eval" in str(result.exception)
    assert not (tmp_path / "scores.html").exists()
