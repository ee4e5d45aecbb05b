"""Bad input from every side: one clear error that says what came and what is accepted, and nothing changed."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mixwright as mw
from mixwright.backbones.tiny import tiny_backbone
from mixwright.cli import build
from mixwright.data.domains import tensor_domain
from mixwright.data.episode_samplers import FixedEpisodes, VariableEpisodes
from mixwright.errors import CatalogError
from mixwright.methods.smat.model import FewShotModel
from mixwright.ops.digest import tensor_digest

from .pools import fresh_pool, moved

IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(3).repeat(2)
NUMBERS = tensor_domain("numbers", torch.arange(24.0)[:, None], torch.arange(4).repeat_interleave(6))


@pytest.fixture(scope="module")
def model() -> FewShotModel:
    return moved(fresh_pool())


def _fit(model: FewShotModel, inputs: Any = IMAGES, labels: Any = LABELS, **settings: Any) -> Any:
    return mw.FewShotClassifier(model, **settings).fit(inputs, labels)


def _predicted(model: FewShotModel, **settings: Any) -> Any:
    return _fit(model).predict(IMAGES, **settings)


CASES: dict[str, tuple[type[Exception], str, Callable[[FewShotModel], Any]]] = {
    "nothing": (TypeError, "inputs: None; expected tensors", lambda m: _fit(m, None)),
    "a number": (TypeError, "inputs: 3; expected", lambda m: m.route((3, LABELS))),
    "complex": (ValueError, "of torch.complex64; expected fractions", lambda m: _fit(m, IMAGES.to(torch.complex64))),
    "ragged": (ValueError, "they make no tensor", lambda m: _fit(m, [[1.0, 2.0], [3.0]] * 3)),
    "bytes": (ValueError, "images of torch.uint8; the backbone reads fractions", lambda m: _fit(m, IMAGES.byte())),
    "bytes by name": (ValueError, "torch.uint8", lambda m: m.route(({"pixel_values": IMAGES.byte()}, LABELS))),
    "bytes asked": (ValueError, "query: images of torch.uint8", lambda m: _fit(m).predict(IMAGES.byte())),
    "no label": (ValueError, "labels: none for item 1", lambda m: _fit(m, labels=["owl", None, "ant"] * 2)),
    "no such file": (TypeError, "'owl.png': there is no such file", lambda m: _fit(m, ["owl.png"] * 6)),
    "nan": (ValueError, "^support: item 0 has NaN", lambda m: m.route((IMAGES / 0, LABELS))),
    "no pool": (TypeError, "model: a ViTModel; expected what mw.compose", lambda m: _fit(m.backbone)),  # type: ignore[arg-type]
    "no model": (TypeError, "model: a NoneType", lambda m: _fit(None)),  # type: ignore[arg-type]
    "steps": (ValueError, "steps=-1: expected a whole number", lambda m: _fit(m, adaptation="full", steps=-1)),
    "batch": (ValueError, "batch_size=0: expected", lambda m: _fit(m, batch_size=0)),
    "rate": (ValueError, "rate -1: expected a finite number", lambda m: _fit(m, adaptation="full", rates=(0, -1))),
    "abstain": (ValueError, "abstain='often': expected a share", lambda m: _predicted(m, abstain="often")),
    "strength": (ValueError, "strength 'full': expected 0", lambda m: m.commit((IMAGES, LABELS), "full")),  # type: ignore[arg-type]
    "resamples": (ValueError, "resamples -1", lambda m: m.route((IMAGES, LABELS), resamples=-1)),
    "nobody left": (ValueError, "no expert is left", lambda m: m.set_active([])),
    "no glob": (TypeError, "give globs one by one", lambda m: m.forbid(["*.bias"])),  # type: ignore[arg-type]
    "experts": (ValueError, "this machine has", lambda m: fresh_pool(experts=10**9)),
    "changes": (ValueError, "this machine has", lambda m: fresh_pool(experts=10**9, changes="own")),
    "half a way": (
        ValueError,
        "ways 2.5: expected 2 or more, a whole number",
        lambda m: FixedEpisodes(domains=(NUMBERS,), ways=2.5, shots=1, queries=1),  # type: ignore[arg-type]
    ),
    "ways in words": (
        ValueError,
        "expected two rising numbers",
        lambda m: VariableEpisodes(domains=(NUMBERS,), ways=("5", "9")),  # type: ignore[arg-type]
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_clear_error_and_changes_nothing(case: str, model: FewShotModel) -> None:
    error, said, call = CASES[case]
    weights = tensor_digest(model.backbone)
    with pytest.raises(error, match=said):
        call(model)
    assert tensor_digest(model.backbone) == weights and model.depth == 0 and model.is_pristine()
    assert model.active == model.experts and model.forbidden == ()


def test_items_the_backbone_cannot_read_are_named_in_training_too(model: FewShotModel) -> None:
    with pytest.raises(ValueError, match=r"items: the backbone, a ViTModel, cannot read items of shape \(3, 9, 9\)"):
        model.frozen_features(torch.randn(2, 3, 9, 9))


def test_numbers_of_numpy_are_numbers(model: FewShotModel) -> None:
    steps: Any = np.int64(1)
    with _fit(model, adaptation="full", rates=(np.float32(1e-3),), steps=steps) as classifier:
        assert len(classifier.predict(IMAGES, abstain=np.float32(0.0))) == 6
    with model.adapted((IMAGES, LABELS), np.float32(0.5)):  # type: ignore[arg-type]
        pass
    FixedEpisodes(domains=(NUMBERS,), ways=np.int64(2), shots=1, queries=1)  # type: ignore[arg-type]


def test_blocks_within_blocks_with_errors_between_end_where_they_began(model: FewShotModel) -> None:
    before = tensor_digest(model.backbone)
    route = model.route((IMAGES, LABELS))
    with pytest.raises(KeyError, match="outer"), model.adapted(route):
        outer = tensor_digest(model.backbone)
        with pytest.raises(KeyError, match="inner"), model.adapted(route.with_weights({0: 0.0}), 0.5):
            model.commit(route, 0.25)
            with pytest.raises(ValueError, match="empty"):
                model.commit((IMAGES[:0], LABELS[:0]))
            raise KeyError("inner")
        assert tensor_digest(model.backbone) == outer and model.depth == 1
        model.rollback()
        assert tensor_digest(model.backbone) == before
        raise KeyError("outer")
    assert model.depth == 0 and model.is_pristine()
    with pytest.raises(ValueError, match="nothing to take back"):
        model.rollback()


@pytest.fixture
def saved(model: FewShotModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "pool")
    return tmp_path / "pool"


@pytest.mark.parametrize("lock", ['{"added": [1]}', '{"added": {"added.safetensors": 3}}', "{}"])
def test_a_lock_that_says_nothing_of_the_tensors_is_refused(lock: str, saved: Path) -> None:
    (saved / "experts.lock.json").write_text(lock)
    with pytest.raises(CatalogError, match=r"says nothing of added.safetensors") as caught:
        mw.load(saved, backbone=tiny_backbone("vit"))
    assert caught.value.code == "CONFIG"


def test_a_composition_that_leaves_no_expert_is_refused(saved: Path) -> None:
    text = (saved / "composition.yaml").read_text()
    assert "\nactive: null\n" in text
    (saved / "composition.yaml").write_text(text.replace("\nactive: null\n", "\nactive: []\n"))
    with pytest.raises(CatalogError, match="no expert is left"):
        mw.load(saved, backbone=tiny_backbone("vit"))


@pytest.mark.parametrize("place", ["file/pool", "locked/pool"])
def test_a_place_that_cannot_be_written_to_is_named(
    place: str, model: FewShotModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    if place.startswith("locked"):  # root may write anywhere, so the system's word is put in its mouth

        def refused(**_: Any) -> str:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("mixwright.files.tempfile.mkdtemp", refused)
    for write in (model.save_pretrained, lambda to: model.export((IMAGES, LABELS), to)):
        with pytest.raises(CatalogError, match="no folder can be made here") as caught:
            write(tmp_path / place)
        assert caught.value.code == "PATH" and str(tmp_path / place) in str(caught.value)
    assert (tmp_path / "file").read_text() == "in the way" and not list(tmp_path.glob("*/.*"))
    assert model.is_pristine()


def _run(*words: object) -> Any:
    return CliRunner().invoke(build(), [str(word) for word in words])


def test_doctor_and_explain_name_what_is_no_place_of_theirs(saved: Path, tmp_path: Path) -> None:
    for words, said in (
        (("doctor", tmp_path / "nowhere"), "no such folder; give a catalogue's, or a model's"),
        (("doctor", saved), "this is a composition; give the folder of the backbone"),
    ):
        done = _run(*words)
        assert done.exit_code and isinstance(done.exception, ValueError) and said in str(done.exception)
    tiny_backbone("vit").save_pretrained(tmp_path / "vit")
    done = _run("explain", saved, "--backbone", tmp_path / "vit", "--output", tmp_path)
    assert isinstance(done.exception, ValueError) and "this is a folder; name a file" in str(done.exception)


def test_folders_that_strangers_made(saved: Path, tmp_path: Path) -> None:
    """Each fault of a folder of class folders is one error that names the item, on the command line."""
    backbone: Any = tiny_backbone("vit")
    backbone.save_pretrained(tmp_path / "vit")
    for place, name in enumerate(("owl", "ant", "b\u00e9\u7532e [x]")):
        (tmp_path / "good" / name).mkdir(parents=True)
        for item in range(3):
            pixels = np.random.default_rng(10 * place + item).integers(0, 255, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "good" / name / f"{item}.png")

    def faulty(name: str, change: Callable[[Path], Any]) -> Path:
        shutil.copytree(tmp_path / "good", tmp_path / name)
        change(tmp_path / name / "ant")
        return tmp_path / name

    faults = {
        "cut": ("damaged image", lambda d: (d / "0.png").write_bytes((d / "0.png").read_bytes()[:200])),
        "garbage": ("not an image", lambda d: (d / "0.png").write_bytes(b"\x89PNG nothing")),
        "circle": ("a link that leads back", lambda d: os.symlink(d.parent, d / "loop")),
        "nowhere": ("cannot be read", lambda d: os.symlink(d / "gone.png", d / "x.png")),
        "pipe": ("neither a file nor a folder", lambda d: os.mkfifo(d / "x.png")),
        "bare": ("class 'void' is empty", lambda d: (d.parent / "void").mkdir()),
        "mixed": ("a domain is of one kind", lambda d: (d / "x.txt").write_text("owl")),
        "single": ("1 class with items", lambda d: [shutil.rmtree(one) for one in d.parent.iterdir() if one != d]),
    }
    for name, (said, change) in faults.items():
        folder = faulty(name, change)
        done = _run("eval", saved, "--backbone", tmp_path / "vit", "--support", folder, "--query", tmp_path / "good")
        assert isinstance(done.exception, ValueError) and said in str(done.exception), (name, done.exception)
    words = ("--backbone", tmp_path / "vit", "--support", tmp_path / "good", "--query", tmp_path / "good", "--json")
    done = _run("eval", saved, *words)
    assert done.exit_code == 0 and json.loads(done.stdout)["queries"] == 9
