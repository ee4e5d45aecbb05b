"""What the method's README shows runs, in order, on a tiny model."""

import re
from pathlib import Path
from typing import Any

import pytest

import mixwright.methods.smat as smat
from mixwright.backbones.tiny import tiny_backbone
from mixwright.config import decode
from mixwright.methods.smat import SmatConfig
from mixwright.recipe import Recipe
from mixwright.yaml12 import parse_yaml

README = Path(smat.__file__).with_name("README.md")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_what_the_readme_shows_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_backbone("vit").save_pretrained("my-vit")  # type: ignore[operator]
    found: dict[str, Any] = {}
    exec(compile("\n".join(blocks("python")), str(README), "exec"), found)
    assert found["model"].adaptations == ("birds",) and found["birds"].classes_.tolist() == ["ant", "bee", "owl"]
    for recipe in blocks("yaml"):
        known = decode(Recipe, parse_yaml(recipe, "README"))  # type: ignore[arg-type]
        decode(SmatConfig, known.config)
