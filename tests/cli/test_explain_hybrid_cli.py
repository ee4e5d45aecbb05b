"""`explain`, `eval` and `run` on a saved hybrid, on files as users have them."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import mixwright as mw
from mixwright.backbones.hf import byte_tokenizer
from mixwright.backbones.tiny import tiny_backbone
from mixwright.cli import build

ROWS = ((0.7, 0.3),)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two components, the hybrid of them, texts, and the logs of two runs."""
    place = tmp_path_factory.mktemp("hybrid")
    for name, family, licence in (("left", "gpt_neox", "apache-2.0"), ("right", "llama", "mit")):
        tiny_backbone(family).save_pretrained(place / name)  # type: ignore[operator]
        byte_tokenizer().save_pretrained(place / name)
        (place / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    model = mw.compose("manticore", backbones=[place / "left", place / "right"], num_blocks=1, mixture_weights=ROWS)
    model.save_pretrained(place / "composed")
    texts = ["A first text.", "And a second one."]
    (place / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for seed in (0, 1):
        folder = place / f"run-{seed}"
        (folder / "search").mkdir(parents=True)
        rows = [{"step": s, "loss": 3.0, "weight.blocks.0.left": 0.5 + 0.1 * s * (1 + seed)} for s in (0, 1, 2)]
        (folder / "search" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "run-0" / "evaluate").mkdir()
    verdict = {"system": "hybrid", "rival": "left", "budget": "equal tokens", "verdict": "better", "value": -0.2}
    verdict |= {"low": -0.3, "high": -0.1, "n": 9, "seeds": [-0.2]}
    (place / "run-0" / "evaluate" / "trained.json").write_text(json.dumps({"findings": {"verdicts": [verdict]}}))
    return place


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(build(), [str(argument) for argument in arguments])


def explained(place: Path, *arguments: object) -> dict[str, Any]:
    result = invoke("explain", place / "composed", "--json", *arguments)
    assert result.exit_code == 0, result.output or result.exception
    return json.loads(result.stdout)


def test_without_texts_it_shows_the_weights_and_says_what_is_missing(place: Path) -> None:
    result = invoke("explain", place / "composed")
    assert result.exit_code == 0, result.output or result.exception
    words = " ".join(result.output.split())
    assert "No text was given" in words and "0.70 layers 0\u20131" in words and "--data FILE" in words
    found = explained(place)
    assert [row["weights"][0] for row in found["rows"]] == pytest.approx([0.7] * 3) and found["systems"] == []


def test_a_page_from_texts_runs_and_records(place: Path) -> None:
    out = place / "page.html"
    runs = ("--runs", place / "run-0", "--runs", place / "run-1")
    result = invoke("explain", place / "composed", "--data", place / "texts.jsonl", *runs, "--out", out, "--no-sweep")
    assert result.exit_code == 0, result.output or result.exception
    page = out.read_text("utf-8")
    assert "At equal tokens, hybrid: better than left (\u22120.200" in page and "run run-0" in page
    assert "mean of 2 runs" in page and "polygon" in page
    assert "Apache-2.0" in page and "MIT" in page and "not legal advice" in page
    assert "the best of its components" in page and "Operations per token, hybrid" in page
    assert "Decode state at 1,024 tokens" in page and "Peak memory" in page
    assert "switched off (--no-sweep)" in page and "wrote" in result.output


def test_a_hybrid_is_composed_by_the_verb(place: Path, tmp_path: Path) -> None:
    both = f"backbones=[{place / 'left'}, {place / 'right'}]"
    result = invoke("compose", "--method", "manticore", "--set", both, "--set", "num_blocks=2", "-o", tmp_path / "made")
    assert result.exit_code == 0, result.output or result.exception
    model: Any = mw.load(tmp_path / "made")
    assert model.experts == ("left", "right") and model.mixture_weights.shape == (2, 2)
    refused = invoke("compose", "--method", "manticore", "--backbone", place / "left", "-o", tmp_path / "other")
    assert refused.exit_code != 0 and "list of two models or more" in str(refused.exception or refused.output)


def test_json_has_every_number(place: Path) -> None:
    found = explained(place, "--data", place / "texts.jsonl", "--limit", 1, "--max-length", 8)
    assert [one["system"] for one in found["systems"]] == [
        "hybrid",
        "left",
        "right",
        "logit ensemble",
        "uniform weights",
    ]
    assert found["texts"]["files"] == ["texts"] and len(found["sweeps"]) == 3 and found["flatness"]["eigenvalues"]
    assert {(c["row"], c["component"], c["forced"]) for c in found["counterfactuals"]} == {
        (r, c, f) for r in ("embedding", "blocks.0", "head") for c in ("left", "right") for f in ("0", "1", "uniform")
    }


def test_one_text_is_measured_too(place: Path) -> None:
    found = explained(place, "--text", "Some text, to be explained.", "--no-sweep")
    assert found["texts"]["files"] == ["the text"] and found["texts"]["tokens"] == 27


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--measure",), "a hybrid is measured on --data FILE"),
        (("--text", "a b", "--without", "left"), "--target and --without are for others"),
        (("--runs", "."), "no log.jsonl with weight"),
        (("--data", "nowhere.jsonl"), "no such file"),
    ],
)
def test_what_does_not_go_is_refused(place: Path, arguments: tuple[str, ...], message: str) -> None:
    result = invoke("explain", place / "composed", *arguments)
    assert isinstance(result.exception, ValueError) and message in str(result.exception)


def test_evaluation_knows_components_ensemble_and_uniform_weights(place: Path) -> None:
    result = invoke("eval", place / "composed", "--data", place / "texts.jsonl", "--json")
    assert result.exit_code == 0, result.output or result.exception
    means = {row["system"]: row["value"] for row in json.loads(result.stdout)["means"]}
    assert set(means) == {
        "left", "right", "logit ensemble", "uniform weights", "routed", "best single expert",
        "oracle (best expert per task)",
    }  # fmt: skip
    model = mw.load(place / "composed")
    table = mw.evaluate(model, place / "texts.jsonl", systems=["experts", "routed"])
    assert table.means("nats")["left"] == pytest.approx(means["left"], abs=1e-6)
    assert len({round(value, 7) for value in means.values()}) >= 5
    words = invoke("eval", place / "composed", "--data", place / "texts.jsonl").output
    assert "best single expert" in words and "routed is" in words


def test_a_hybrid_writes_and_says_who_had_the_say(place: Path) -> None:
    result = invoke("run", place / "composed", "--prompt", "Once", "--max-new-tokens", 3, "--json")
    assert result.exit_code == 0, result.output or result.exception
    found = json.loads(result.stdout)
    assert found["tokens"] > 0 and sum(one["weight"] for one in found["experts"]) == pytest.approx(1.0)
    assert found["experts"][0] == {"expert": "left", "weight": pytest.approx(0.7)}
    traced = invoke("run", place / "composed", "--prompt", "Once", "--trace")
    assert "hybrid of whole models" in str(traced.exception)
