"""What the method's README shows runs, in order, on tiny models, with fewer steps."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import mixwright as mw
import mixwright.methods.manticore as manticore
from mixwright.backbones.hf import byte_tokenizer
from mixwright.backbones.tiny import tiny_backbone
from mixwright.config import decode
from mixwright.data.mad import SMALL
from mixwright.methods.manticore import ManticoreConfig
from mixwright.recipe import read_recipe

from .pair import texts

README = Path(manticore.__file__).with_name("README.md")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_what_the_readme_shows_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, family in (("my-neox", "gpt_neox"), ("my-mamba", "mamba2")):
        tiny_backbone(family).save_pretrained(name)  # type: ignore[operator]
        byte_tokenizer().save_pretrained(name)
    for split in ("train", "validation", "test"):
        texts(tmp_path, split)
    (recipe,) = blocks("yaml")
    short = re.sub(r"_steps: \d+", "_steps: 2", recipe).replace("choose_every: 25", "choose_every: 1")
    assert short.count("_steps: 2") == 4
    (tmp_path / "hybrid.yaml").write_text(short)
    code = "\n".join(blocks("python"))
    assert "steps=300" in code
    code = code.replace("steps=300", "steps=1, batch_size=2, tasks=tasks")
    inputs = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]])}
    one = next(iter(SMALL))
    found: dict[str, Any] = {"inputs": inputs, "tasks": {one: SMALL[one]}}
    exec(compile(code, str(README), "exec"), found)
    with torch.no_grad():
        assert torch.equal(found["alone"], tiny_backbone("gpt_neox")(**inputs).logits)
        torch.testing.assert_close(found["again"](**inputs).logits, found["mixed"])
        kept: Any = mw.load("my-small-hybrid")
        torch.testing.assert_close(kept(**inputs).logits, found["trained"](**inputs).logits)
    assert not torch.equal(found["alone"], found["mixed"])
    assert tuple(found["report"].stages) == ("inspect", "align", "search", "tune", "discretise", "evaluate")
    assert found["report"].composition == "runs/hybrid/discretise/composition"
    assert found["written"].shape[1] > 3
    assert found["able"] == ((0.0, 1.0), (0.0, 1.0))  # the tiny GPT-NeoX reads 512 tokens
    torch.testing.assert_close(found["programmed"].mixture_weights, torch.tensor(found["rows"]))


def test_its_recipe_is_read(tmp_path: Path) -> None:
    (block,) = blocks("yaml")
    path = tmp_path / "recipe.yaml"
    path.write_text(block)
    config = decode(ManticoreConfig, dict(read_recipe(path).config))
    assert config.controls == "flops" and config.num_blocks == 2
