"""`explain` and `run`: what they print, write and refuse. The composed model is a stand-in for one from a folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from mixwright.backbones.hf import byte_tokenizer
from mixwright.backbones.tiny import FAMILIES, tiny_backbone
from mixwright.cli import build
from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel, Composition
from mixwright.experts.lora import LoraExperts
from mixwright.experts.poly import PolyExperts
from mixwright.routers.gate import PrototypeScores
from mixwright.routers.task import TaskLogits
from mixwright.routers.token import TokenRouter
from mixwright.sites import linear_sites

TEXT = "Some text, to be explained."


@pytest.fixture(params=["llama"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that opens as a composition of two experts on a tiny backbone."""
    kind = FAMILIES[request.param][1]
    byte_tokenizer(kind).save_pretrained(tmp_path / "base")

    def load(path: Path, backbone: Any = None) -> ComposedModel:
        assert path == tmp_path
        return composed(request.param, backbone or str(tmp_path / "base"))

    monkeypatch.setattr("mixwright.api.load", load)
    return tmp_path


def composed(family: str, home: str) -> ComposedModel:
    backbone = tiny_backbone(family)
    made = torch.Generator().manual_seed(0)
    mixtures = {
        path: Mixture(
            backbone.get_submodule(path),
            TokenRouter(PrototypeScores(torch.randn(2, site.d_in, generator=made)), 1),
            LoraExperts(
                torch.randn(2, 2, site.d_in, generator=made) * 0.3,
                torch.randn(2, site.d_out, 2, generator=made) * 0.3,
                torch.ones(2),
                2,
            ),
        )
        for path, site in linear_sites(backbone).items()
        if not path.endswith("lm_head")
    }
    described = Composition(
        method="phatgoose", backbone={"path": home}, experts=({"id": "law", "licence": "MIT"}, {"id": "code"})
    )
    return ComposedModel(backbone, mixtures, ("law", "code"), described)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(build(), [str(argument) for argument in arguments])


def test_explain_prints_the_text_and_what_an_expert_is_worth(folder: Path) -> None:
    result = invoke("explain", folder, "--text", TEXT, "--without", "law")
    assert result.exit_code == 0, result.output
    assert "[La]" in result.output and "[Co]" in result.output
    assert "without law, this passage costs" in result.output


def test_explain_writes_a_page_and_reads_a_file(folder: Path) -> None:
    (folder / "text.txt").write_text(TEXT)
    result = invoke("explain", folder, "--file", folder / "text.txt", "--output", folder / "page.html")
    assert result.exit_code == 0, result.output
    page = (folder / "page.html").read_text("utf-8")
    assert page.startswith("<!doctype html>") and "MIT" in page
    assert "[La]" not in result.output and "wrote" in result.output
    both = invoke("explain", folder, "--file", folder / "text.txt", "--output", folder / "page.html", "--terminal")
    assert "[La]" in both.output and (folder / "page.html").read_text("utf-8") == page


def test_explain_as_json_is_the_explanation(folder: Path) -> None:
    result = invoke("explain", folder, "--text", TEXT, "--json")
    found = json.loads(result.output)
    assert "".join(token["text"] for token in found["tokens"]) == TEXT
    assert found["experts"] == ["law", "code"] and found["without"] in ("law", "code")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give one of --text TEXT and --file FILE"),
        (("--text", "a", "--file", "b"), "give one of"),
        (("--text", TEXT, "--without", "nobody"), "no expert 'nobody' in this model; it has law, code."),
        (("--text", TEXT, "--target", "x"), "no decoder of its own"),
    ],
)
def test_explain_refuses(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    result = invoke("explain", folder, *arguments)
    assert isinstance(result.exception, ValueError) and message in str(result.exception)


def test_explain_refuses_a_file_that_is_no_text(folder: Path) -> None:
    (folder / "bytes").write_bytes(b"\xff\xfe\x00")
    result = invoke("explain", folder, "--file", folder / "bytes")
    assert isinstance(result.exception, ValueError) and "no UTF-8 text" in str(result.exception)


@pytest.fixture
def multitask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that opens as a composition routed by task."""
    byte_tokenizer("causal").save_pretrained(tmp_path / "base")

    def load(path: Path, backbone: Any = None) -> ComposedModel:
        made = torch.Generator().manual_seed(0)
        model = tiny_backbone("llama", num_hidden_layers=1)
        mixtures = {
            path: Mixture(
                model.get_submodule(path),
                TaskLogits(2 * torch.randn(2, 4, generator=made)),
                PolyExperts(
                    torch.randn(4, 1, site.d_in, generator=made), torch.randn(4, 1, site.d_out, generator=made)
                ),
            )
            for path, site in linear_sites(model).items()
            if path.endswith("q_proj")
        }
        home = backbone or str(path / "base")
        described = Composition(method="poly", config={"tasks": ["mood", "to[b]pic"]}, backbone={"path": home})
        return ComposedModel(model, mixtures, tuple("abcd"), described)

    monkeypatch.setattr("mixwright.api.load", load)
    return tmp_path


def test_explain_without_a_text_shows_a_model_routed_by_task(multitask: Path) -> None:
    result = invoke("explain", multitask)
    assert result.exit_code == 0, result.output
    assert "2 tasks, 4 latent experts in each of 1 layers" in result.output and "to[b]pic" in result.output
    assert "Milliseconds" not in result.output
    page = multitask / "tasks.html"
    result = invoke("explain", multitask, "--output", page, "--measure")
    assert result.exit_code == 0 and "wrote" in result.output and "2 tasks" not in result.output
    written = page.read_text("utf-8")
    assert "to[b]pic" in written and f"mixwright explain {multitask.name} --measure" in written


def test_explain_prints_the_routing_by_task_as_json(multitask: Path) -> None:
    found = json.loads(invoke("explain", multitask, "--json").output)
    assert found["tasks"] == ["mood", "to[b]pic"] and found["times"] is None and found["alarms"] == []
    assert sum(found["layers"][0]["share"][0][0]) == pytest.approx(1.0, abs=1e-4)
    assert json.loads(invoke("explain", multitask, "--json", "--measure").output)["times"]["train"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--text", TEXT), "routed by task: every token of a text gets the same"),
        (("--text", TEXT, "--measure"), "--measure times a model routed by task, without a text"),
        (("--without", "a"), "--target and --without go with a text"),
    ],
)
def test_explain_refuses_a_text_for_a_model_routed_by_task(
    multitask: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = invoke("explain", multitask, *arguments)
    assert isinstance(result.exception, ValueError) and message in str(result.exception)


def test_explain_measures_no_other_model(folder: Path) -> None:
    result = invoke("explain", folder, "--measure")
    assert isinstance(result.exception, ValueError) and "give one of --text" in str(result.exception)


@pytest.mark.parametrize("folder", ["llama", "t5"], indirect=True)
def test_run_streams_the_answer_that_generate_gives(folder: Path, request: pytest.FixtureRequest) -> None:
    family = request.node.callspec.params["folder"]
    found = json.loads(invoke("run", folder, "--prompt", "Once", "--max-new-tokens", 8, "--json", "--trace").output)
    tokenizer = byte_tokenizer(FAMILIES[family][1])
    ids = tokenizer("Once", return_tensors="pt")
    model = composed(family, str(folder / "base"))
    with torch.no_grad():
        full = model.generate(**{k: ids[k] for k in ("input_ids", "attention_mask")}, max_new_tokens=8, do_sample=False)
    answer = full[0, 1 if family == "t5" else ids["input_ids"].shape[1] :]
    assert found["text"] == tokenizer.decode(answer, skip_special_tokens=True)
    assert found["tokens"] == len(answer)
    assert sum(one["weight"] for one in found["experts"]) == pytest.approx(1.0)
    assert {token["stream"] for token in found["trace"]["tokens"]} == (
        {"source", "target"} if family == "t5" else {"text"}
    )
    printed = invoke("run", folder, "--prompt", "Once", "--max-new-tokens", 8)
    assert f"{len(answer)} tokens; " in printed.output and "%" in printed.output


def test_run_samples_from_its_seed(folder: Path) -> None:
    def sample(seed: int) -> str:
        asked = ("--prompt", "Once", "--max-new-tokens", 12, "--temperature", 1.5, "--seed", seed, "--json")
        return json.loads(invoke("run", folder, *asked).output)["text"]

    assert sample(1) == sample(1) != sample(2)


@pytest.mark.parametrize("folder", ["bert"], indirect=True)
def test_run_refuses_a_backbone_that_writes_nothing(folder: Path) -> None:
    result = invoke("run", folder, "--prompt", "Once")
    assert isinstance(result.exception, ValueError) and "writes no text" in str(result.exception)
