"""Verbs on a composition that is routed by task: each says which task it is about, and export writes one down."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from typer.testing import CliRunner, Result

import mixwright as mw
from mixwright.backbones.hf import byte_tokenizer, load_backbone
from mixwright.backbones.tiny import FAMILIES, tiny_backbone
from mixwright.cli import build
from mixwright.composition.inputs import example_inputs
from mixwright.composition.model import ComposedModel

TASKS = ("rte", "copa", "glue/mnli")


def made(folder: Path, family: str = "llama", **config: Any) -> Path:
    """A composition with random latent experts on a tiny backbone, both as folders."""
    home = folder / f"{family}-base"
    if not home.exists():
        tiny_backbone(family).save_pretrained(home)
        byte_tokenizer(FAMILIES[family][1]).save_pretrained(home)
    settings = {"experts": "entangled", "rank": 2, **({} if config.get("experts") == "tlora" else {"tasks": TASKS})}
    model = mw.compose("tensorpoly", backbone=home, **{**settings, **config})
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name or ".router." in name:
                parameter.normal_(std=0.5 if ".experts." in name else 2.0)
    model.save_pretrained(folder / f"{family}-composed")
    return folder / f"{family}-composed"


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("by-task"))


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(build(), [str(argument) for argument in arguments])


def done(*arguments: object) -> Any:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


def fails(message: str, *arguments: object) -> None:
    result = invoke(*arguments)
    assert isinstance(result.exception, ValueError), (result.output, result.exception)
    assert message in str(result.exception)


def logits(model: Any, **more: Any) -> torch.Tensor:
    inputs = example_inputs(model.backbone if isinstance(model, ComposedModel) else model.base_model.model) or {}
    with torch.no_grad():
        return model(**inputs, **more).logits


def test_a_task_becomes_a_lora_and_an_expert(composed: Path, tmp_path: Path) -> None:
    found = done("experts", "export", composed, "copa", "--output", tmp_path / "copa")
    (one,) = found["exported"]
    assert one["task"] == "copa" and one["rank"] == 2 and not found["merged"]
    base = composed.parent / "llama-base"
    opened = PeftModel.from_pretrained(load_backbone(base), tmp_path / "copa").eval()
    wanted = logits(mw.load(composed), task_ids=torch.tensor([1]))
    torch.testing.assert_close(logits(opened), wanted, rtol=1e-6, atol=1e-6)
    added = done("experts", "add", tmp_path / "shelf", tmp_path / "copa", "--backbone", base, "--licence", "mit")
    assert added["id"] == "copa" and added["rank"] == 2
    findings = done("experts", "check", tmp_path / "shelf", "--backbone", base)["findings"]
    assert [finding["code"] for finding in findings] == ["GATES"]  # a LoRA alone brings no gate, and that is all


def test_a_task_becomes_merged_weights(composed: Path, tmp_path: Path) -> None:
    result = invoke("experts", "export", composed, 2, "-o", tmp_path / "mnli", "--merged")
    assert result.exit_code == 0 and "merged weights" in result.output, (result.output, result.exception)
    opened = load_backbone(tmp_path / "mnli")
    with torch.no_grad():
        found = opened(**(example_inputs(opened) or {})).logits
    wanted = logits(mw.load(composed), task_ids=torch.tensor([2]))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert (tmp_path / "mnli" / "tokenizer.json").is_file()


def test_all_tasks_at_once(tmp_path: Path) -> None:
    folder = made(tmp_path, tasks=("rte", "copa"), experts="poly", num_latent=2)
    found = done("experts", "export", folder, "--all", "--output", tmp_path / "loras")
    assert [one["task"] for one in found["exported"]] == ["rte", "copa"]
    assert sorted(p.name for p in (tmp_path / "loras").iterdir()) == ["copa", "rte"]


def test_what_can_not_be_exported_is_said(composed: Path, tmp_path: Path) -> None:
    export = ("experts", "export", composed)
    fails("say where it goes: --output", *export, "rte")
    fails("routed by task; say which: rte, copa, glue/mnli", *export, "-o", tmp_path / "x")
    fails("no task 'cop' in this model; did you mean 'copa'?", *export, "cop", "-o", tmp_path / "x")
    fails("no task 3 in this model; it has 3", *export, "3", "-o", tmp_path / "x")
    fails("task 'glue/mnli' can't be the name of a folder", *export, "--all", "-o", tmp_path / "x")
    fails("--all writes every task; leave 'rte' out", *export, "rte", "--all", "-o", tmp_path / "x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    result = invoke(*export, "rte", "-o", tmp_path / "full")
    assert isinstance(result.exception, mw.CatalogError) and "in use" in str(result.exception)
    assert [p.name for p in tmp_path.rglob("*")] == ["full", "note"]


def test_a_composition_without_tasks(tmp_path: Path) -> None:
    folder = made(tmp_path, experts="tlora")
    assert done("experts", "export", folder, "-o", tmp_path / "lora")["exported"][0]["task"] is None
    fails("this composition knows no tasks; leave the task out", "run", folder, "--prompt", "x", "--task", "rte")
    fails("knows no tasks; leave --all out", "experts", "export", folder, "--all", "-o", tmp_path / "x")


def test_run_is_of_a_task(composed: Path) -> None:
    run = ("run", composed, "--prompt", "one, two", "--max-new-tokens", 6)
    texts = {task: done(*run, "--task", task)["text"] for task in TASKS}
    assert done(*run, "--task", "1")["text"] == texts["copa"]
    assert len(set(texts.values())) > 1
    found = done(*run, "--task", "rte")
    assert found["task"] == "rte" and {one["expert"] for one in found["experts"]} == {"latent-0", "latent-1"}
    fails("this composition is routed by task; say which: rte, copa, glue/mnli", *run)
    fails("did you mean 'rte'?", *run, "--task", "rtee")
    fails("--trace explains token by token, and this model is routed by task", *run, "--task", "rte", "--trace")


def rows(folder: Path, name: str, family: str = "llama") -> Path:
    made = [{"prompt": f"say {i} ", "completion": str(i)} for i in range(6)]
    if family == "bert":
        made = [{"text": f"text {i}", "label": ["no", "yes"][i % 2]} for i in range(6)]
    (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in made))
    return folder / f"{name}.jsonl"


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_eval_scores_each_file_under_its_task(family: str, tmp_path: Path) -> None:
    folder = made(tmp_path, family)
    files = [rows(tmp_path, name, family) for name in ("rte", "copa", "other")]
    metric = "nats"

    def scores(*arguments: object) -> dict[tuple[str, str], float]:
        found = done("eval", folder, "--metric", metric, *arguments)["scores"]
        return {(one["system"], one["task"]): one["value"] for one in found if one["metric"] == metric}

    by_name = scores("--data", files[0], "--data", files[1])
    assert {system for system, _ in by_name} == {"backbone", "parameter average", "routed"}
    assert by_name["routed", "rte"] != by_name["routed", "copa"]  # the same rows under two tasks
    assert by_name["backbone", "rte"] == by_name["backbone", "copa"]
    as_rte = scores("--data", files[2], "--data", files[1], "--task", "rte", "--systems", "routed")
    assert as_rte["routed", "other"] == as_rte["routed", "copa"] == by_name["routed", "rte"]
    each = scores("--data", files[2], "--data", files[1], "--task", "copa", "--task", "0", "--systems", "routed")
    assert each["routed", "other"] == by_name["routed", "copa"] and each["routed", "copa"] == by_name["routed", "rte"]
    fails("other is no task of this model (rte, copa, glue/mnli)", "eval", folder, "--data", files[2])
    fails("2 tasks for 1 files", "eval", folder, "--data", files[2], "--task", "rte", "--task", "copa")
    fails("this baseline reads LoRA experts only", "eval", folder, "--data", files[0], "--systems", "experts")


def test_the_python_call_scores_the_same(composed: Path, tmp_path: Path) -> None:
    model = mw.load(composed)
    table = mw.evaluate(model, rows(tmp_path, "other"), of_tasks=["copa"], tokenizer=byte_tokenizer())
    assert set(table.systems) == {"backbone", "parameter average", "routed"}
