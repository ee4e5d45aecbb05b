"""What the method's README shows runs, in order, on a tiny model; its recipe is read."""

import re
from pathlib import Path

import pytest
import torch

import mixwright.methods.peer as peer
from mixwright.backbones.hf import byte_tokenizer
from mixwright.backbones.tiny import tiny_backbone
from mixwright.config import decode
from mixwright.recipe import read_recipe

README = Path(peer.__file__).with_name("README.md")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_backbone("llama").save_pretrained("my-backbone")
    byte_tokenizer().save_pretrained("my-backbone")
    inputs = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]])}
    names: dict[str, object] = {"inputs": inputs}
    exec(compile("\n".join(blocks("python")), str(README), "exec"), names)
    logits, before = names["logits"], names["before"]
    with torch.no_grad():
        assert torch.equal(before, tiny_backbone("llama")(**inputs).logits)
        assert torch.equal(before, names["beside"](**inputs).logits)
        torch.testing.assert_close(logits, names["again"](**inputs).logits)
    assert not torch.equal(before, logits)


def test_its_recipes_are_read(tmp_path: Path) -> None:
    assert blocks("yaml")
    for block in blocks("yaml"):
        path = tmp_path / "recipe.yaml"
        path.write_text(block)
        recipe = read_recipe(path)
        decode(peer.PeerConfig, recipe.config)
