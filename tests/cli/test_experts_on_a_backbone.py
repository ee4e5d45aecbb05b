"""The verbs that load a backbone: kept apart, because transformers takes seconds to import."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from mixwright.catalog.adapter import LoraFactors
from mixwright.catalog.store import Catalog
from mixwright.cli import build
from mixwright.composition import selfcheck
from mixwright.errors import IncompatibleExpert


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """A folder with a backbone, a catalogue for it, and one expert that fits."""
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=1, hidden_size=8, intermediate_size=12, num_attention_heads=2, vocab_size=20)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "backbone")
    factors = {"model.layers.0.self_attn.q_proj": LoraFactors(torch.randn(2, 8), torch.randn(8, 2), 1.0)}
    Catalog(tmp_path / "catalog").publish("law", factors, peft_config={"task_type": "CAUSAL_LM"}, licence="mit")
    return tmp_path


def check(shelf: Path, *more: str) -> tuple[int, Any]:
    arguments = ["experts", "check", str(shelf / "catalog"), "--backbone", str(shelf / "backbone"), "--json", *more]
    result = CliRunner().invoke(build(), arguments)
    return result.exit_code, json.loads(result.stdout)


def test_check_runs_each_expert_alone(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, found = check(shelf)
    assert status == 0 and {one["level"] for one in found["findings"]} <= {"warning"}

    def wrong(*_: object) -> None:
        raise IncompatibleExpert("SELFCHECK", "law", "it gives something else")

    monkeypatch.setattr(selfcheck, "_check_site", wrong)
    status, found = check(shelf, "law")
    assert status == 1 and found["findings"][-1]["code"] == "SELFCHECK"


def test_add_against_a_backbone(shelf: Path) -> None:
    source = shelf / "catalog" / "experts" / "law"
    (source / "card.json").unlink()
    arguments = ["experts", "add", str(shelf / "other"), str(source), "--backbone", str(shelf / "backbone"), "--json"]
    result = CliRunner().invoke(build(), arguments)
    assert result.exit_code == 0 and json.loads(result.stdout)["backbone"] is not None
