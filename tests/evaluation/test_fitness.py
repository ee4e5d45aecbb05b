"""Models that are fit for few-shot adaptation and models that are not, each for its own reason."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from mixwright.backbones.tiny import tiny_backbone
from mixwright.cli import build
from mixwright.evaluation.fitness import Fitness, cost_lines, fitness
from mixwright.ops.digest import tensor_digest


def _levels(found: Fitness) -> dict[str, str]:
    return {one.name: one.level for one in found.findings}


@pytest.mark.parametrize("family", ["vit", "bert", "gpt2"])
def test_a_model_that_is_fit(family: str) -> None:
    model = tiny_backbone(family)
    before = tensor_digest(model)
    found = fitness(model)
    assert found.verdict == "fit" and found.library == "transformers"
    assert set(_levels(found)) == {
        "weights", "tied weights", "norms", "features", "determinism", "replacing weights", "left alone",
    }  # fmt: skip
    assert tensor_digest(model) == before and found.weights == sum(p.numel() for p in model.parameters())
    assert ("lm_head.weight" in str(found.findings)) == (family == "gpt2")


def test_memory_is_counted() -> None:
    model = nn.Sequential(nn.Linear(10, 10, bias=False))
    found = fitness(model, experts=4, inputs=torch.randn(2, 10))
    assert found.weights == 100 and found.library == "plain torch"
    tuning, serving = list(found.bytes.values())[1:3]
    assert tuning == 400 + 2 * 4 * 100 * 5 + 800 and serving == 400 + 4 * 100 * 5 + 400
    assert found.seconds_per_item is not None and len(cost_lines(found)) == 6


class _Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("calls").add_(1)
        return self.layer(x)


class _Drawing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.rand(4)


class _Own(nn.Module):
    """Keeps its weights where nobody who replaces parameters finds them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.kept = [self.layer.weight]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kept[0].T


@pytest.mark.parametrize(
    ("model", "name", "level"),
    [
        (_Counting(), "left alone", "bad"),
        (_Drawing(), "determinism", "bad"),
        (_Own(), "replacing weights", "bad"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "norms", "remark"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)), "norms", "bad"),
        (nn.Sequential(nn.Linear(5, 4)), "features", "bad"),
        (nn.Sequential(nn.Identity()), "weights", "bad"),
    ],
)
def test_what_is_wrong_is_said(model: nn.Module, name: str, level: str) -> None:
    found = fitness(model, inputs=torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    assert _levels(found)[name] == level
    assert found.verdict == ("not fit" if level == "bad" else "fit, with remarks")


def test_a_model_that_nobody_described_gets_a_remark() -> None:
    assert fitness(nn.Linear(4, 4)).verdict == "fit, with remarks"


def test_on_the_command_line(tmp_path: Path) -> None:
    model: Any = tiny_backbone("vit")
    model.save_pretrained(tmp_path / "vit")
    shown = CliRunner().invoke(build(), ["doctor", str(tmp_path / "vit"), "--experts", "4"])
    assert (
        shown.exit_code == 0 and "is fit for few-shot adaptation" in shown.output and "4 sparse experts" in shown.output
    )
    found = json.loads(CliRunner().invoke(build(), ["doctor", str(tmp_path / "vit"), "--json"]).stdout)
    assert found["model"]["verdict"] == "fit" and found["model"]["experts"] == 8 and found["findings"] is None
