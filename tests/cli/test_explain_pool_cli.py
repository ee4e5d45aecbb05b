"""`explain` on a saved pool: with examples in files, on queries, for machines, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import mixwright as mw
from mixwright.backbones.hf import load_backbone
from mixwright.backbones.tiny import tiny_backbone
from mixwright.cli import build
from mixwright.composition.episodic import EpisodicModel


def _examples(path: Path, seed: int, items: int = 9) -> Path:
    shapes = np.random.default_rng(5).normal(size=(3, 3, 16, 16))
    noise = np.random.default_rng(seed).normal(size=(items, 3, 16, 16))
    labels = np.arange(items) % 3
    np.savez(path, x=(shapes[labels] + 0.3 * noise).astype("float32"), y=labels)
    return path


@pytest.fixture(scope="module", params=["whole", "block"])
def pool(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    home = tmp_path_factory.mktemp("pool")
    backbone: Any = tiny_backbone("vit")
    backbone.save_pretrained(home / "backbone")
    model = mw.compose("smat", backbone=load_backbone(home / "backbone"), experts=3, mixture=request.param)
    assert isinstance(model, EpisodicModel)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.mixture.experts.named_parameters():
            if not name.startswith("multi"):
                shift = 0 if name.startswith("delta") else -3.5
                tensor.copy_(
                    torch.randn(tensor.shape, generator=draw) * (0.1 if name.startswith("delta") else 2) + shift
                )
    model.save_pretrained(home / "pool")
    _examples(home / "shapes.npz", 1)
    _examples(home / "others.npz", 2)
    _examples(home / "held.npz", 3, 30)
    return home


def _run(*words: object):
    return CliRunner().invoke(build(), ["explain", *map(str, words)])


def test_a_page_with_a_task_measured_on_queries(pool: Path, tmp_path: Path) -> None:
    done = _run(
        pool / "pool", "--support", pool / "shapes.npz", "--query", pool / "held.npz", "-o", tmp_path / "p.html"
    )
    assert done.exit_code == 0, done.output
    page = (tmp_path / "p.html").read_text()
    assert "Measured on 30 query items" in page and "shapes.npz" in page


def test_json_of_two_tasks(pool: Path) -> None:
    done = _run(pool / "pool", "--support", pool / "shapes.npz", "--support", pool / "others.npz", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["tasks"]["names"] == ["shapes.npz", "others.npz"] and len(found["episodes"]) == 2
    assert found["episodes"][0]["items"] == 9 and found["mixture"] == "shapes.npz"
    assert len(found["overlap"]) == len(found["experts"]) == 3


def test_the_terminal_alone(pool: Path) -> None:
    done = _run(pool / "pool")
    assert done.exit_code == 0 and "3 experts, each of which changes" in done.output and "moves most" in done.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--query", "held.npz"), "give one --support with it"),
        (("--support", "shapes.npz", "--text", "x"), "without a text"),
        (("--support", "nothing.npz"), "no such file"),
    ],
)
def test_what_is_refused(words: tuple[str, ...], said: str, pool: Path) -> None:
    given = [pool / word if word.endswith("npz") else word for word in words]
    done = _run(pool / "pool", *given)
    assert done.exit_code != 0 and isinstance(done.exception, ValueError) and said in str(done.exception)
