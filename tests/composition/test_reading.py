"""Pictures, paths and texts as a person has them, read by what lies beside the backbone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mixwright as mw
from mixwright.backbones.hf import byte_tokenizer, load_backbone
from mixwright.backbones.tiny import tiny_backbone

LABELS = ["cat", "cat", "dog", "dog"]


def pictures() -> list[Image.Image]:
    values = np.random.default_rng(0).integers(0, 256, (4, 24, 20, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in values]


@pytest.fixture
def vision(tmp_path: Path) -> Any:
    tiny_backbone("vit").save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps({"size": 16, "image_mean": 0.25}))
    return mw.compose("smat", backbone=load_backbone(tmp_path / "vit"), experts=2)


def test_pictures_and_paths_to_them_are_read_alike(vision: Any, tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for path, picture in zip(paths, pictures()):
        picture.save(path)
    opened, named, written = (vision.read(items) for items in (pictures(), paths, [str(path) for path in paths]))
    assert opened.shape == (4, 3, 16, 16) and torch.equal(opened, named) and torch.equal(opened, written)
    assert float(opened.min()) >= -0.5 and float(opened.max()) > 1.0  # (x - 0.25) / 0.5
    assert torch.equal(vision.route((paths, LABELS)).weights, vision.route((pictures(), LABELS)).weights)


def test_a_picture_that_is_not_there_is_named(vision: Any) -> None:
    with pytest.raises(ValueError, match="nothing.png: cannot be read"):
        vision.read([Path("nothing.png")])
    for text in ("nothing.png", "a text", "\0", "x" * 9999):
        with pytest.raises(TypeError, match="there is no such file; the backbone reads pictures"):
            vision.read([text])
    with pytest.raises(TypeError, match="a int among pictures"):
        vision.read([pictures()[0], 3])
    with pytest.raises(TypeError, match="items of object: nothing beside the backbone reads them"):
        vision.read([object()])


def test_pictures_are_not_for_a_backbone_of_texts(tmp_path: Path) -> None:
    tiny_backbone("bert").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model: Any = mw.compose("smat", backbone=load_backbone(tmp_path), experts=2)
    assert model.read(["a text", "b"])["input_ids"].shape[0] == 2
    with pytest.raises(TypeError, match="items of Image: nothing beside the backbone reads them"):
        model.read(pictures())
