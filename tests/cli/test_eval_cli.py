"""`eval`: one table out of a composition and files. The composed model is a stand-in for one from a folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mixwright.backbones.hf import byte_tokenizer
from mixwright.backbones.tiny import FAMILIES, tiny_backbone
from mixwright.cli import build
from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel, Composition
from mixwright.experts.lora import LoraExperts
from mixwright.routers.gate import PrototypeScores
from mixwright.routers.token import TokenRouter
from mixwright.sites import linear_sites


@pytest.fixture(params=["llama", "bert"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    family = request.param
    byte_tokenizer(FAMILIES[family][1]).save_pretrained(tmp_path / "base")

    def load(path: Path, backbone: Any = None) -> ComposedModel:
        return composed(family, backbone or str(tmp_path / "base"))

    monkeypatch.setattr("mixwright.api.load", load, raising=False)
    rows = [{"text": f"text {i}", "label": ["no", "yes"][i % 2]} for i in range(6)]
    if family == "llama":
        rows = [{"prompt": f"say {i} ", "completion": str(i)} for i in range(6)]
    for name in ("first", "second"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


def composed(family: str, home: str) -> ComposedModel:
    backbone = tiny_backbone(family)
    made = torch.Generator().manual_seed(0)
    mixtures = {}
    for path, site in linear_sites(backbone).items():
        if not path.endswith("lm_head") and "pooler" not in path:
            down, up = torch.randn(2, 2, site.d_in, generator=made), torch.randn(2, site.d_out, 2, generator=made)
            router = TokenRouter(PrototypeScores(torch.randn(2, site.d_in, generator=made)), 1)
            experts = LoraExperts(0.3 * down, 0.3 * up, torch.ones(2), 2)
            mixtures[path] = Mixture(backbone.get_submodule(path), router, experts)
    return ComposedModel(backbone, mixtures, ("law", "code"), Composition(method="phatgoose", backbone={"path": home}))


def call(folder: Path, *options: str):
    files = ["--data", str(folder / "first.jsonl"), "--data", str(folder / "second.jsonl")]
    return CliRunner().invoke(build(), ["eval", str(folder), *files, *options], catch_exceptions=False)


def test_json_has_every_system_and_intervals(folder: Path) -> None:
    found = json.loads(call(folder, "--json").stdout)
    systems = [row["system"] for row in found["means"]]
    assert systems[:3] == ["backbone", "law", "code"]
    assert {"merged product", "parameter average", "Arrow", "SpectR", "routed", "best single expert"} <= set(systems)
    row = found["means"][-1]
    assert row["low"] <= row["value"] <= row["high"] and row["n"] == 12 and "minus_backbone" in row
    assert {"system", "task", "metric", "value", "stderr", "n", "seed"} <= set(found["scores"][0])


def test_the_table_names_tasks_and_says_the_verdict(folder: Path) -> None:
    result = call(folder, "--systems", "backbone,merged,routed", "--limit", "3")
    assert result.exit_code == 0, result.output
    assert "first" in result.stdout and "routed is" in result.stdout and "merged product" in result.stdout


def test_unknown_names_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="no system is called 'best'"):
        call(folder, "--systems", "backbone,best")
    with pytest.raises(ValueError, match="--metric colour"):
        call(folder, "--systems", "backbone", "--metric", "colour")
