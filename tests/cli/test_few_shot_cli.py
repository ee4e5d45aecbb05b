"""Few-shot compositions on the command line: trained, adapted to new tasks, scored and asked."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import mixwright as mw
from mixwright.backbones.hf import byte_tokenizer
from mixwright.backbones.tiny import tiny_backbone
from mixwright.cli import build
from mixwright.data.synthetic_episodes import image_domains, text_domains
from mixwright.methods.smat.classifier import FewShotClassifier
from mixwright.methods.smat.model import FewShotModel

EPISODES = {"ways": [2, 4], "queries": 2, "support": 12, "augment": "none"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained composition over tiny images and one over texts, the latter by block, each with a new task."""
    root = tmp_path_factory.mktemp("few-shot")
    tiny_backbone("vit").save_pretrained(root / "vit")
    tiny_backbone("bert").save_pretrained(root / "bert")
    byte_tokenizer().save_pretrained(root / "bert")
    for name, domain in image_domains(("strokes", "dots"), size=16, classes=6, items=6).items():
        pixels = domain.items.permute(0, 2, 3, 1).numpy()
        np.savez(root / f"{name}.npz", images=pixels, labels=np.array(domain.labels))
        for row, label in enumerate(domain.labels if name == "dots" else ()):
            part = "known" if row % 6 < 3 else "asked"
            (root / part / f"class-{label}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[row]).save(root / part / f"class-{label}" / f"{row}.png")
    for name, domain in text_domains(("notes", "chat"), classes=4, items=4).items():
        rows = [{"text": text, "label": domain.class_names[at]} for text, at in zip(domain.items, domain.labels)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(root, "vit", "strokes.npz", "known")
    train(root, "bert", "notes.jsonl", "chat.jsonl", mixture="block", diversity=0.3)
    return root


def train(root: Path, backbone: str, domain: str, task: str, **config: Any) -> None:
    recipe = {
        "method": "smat",
        "backbone": str(root / backbone),
        "output_dir": str(root / f"run-{backbone}"),
        "data": {"domains": {"one": str(root / domain)}, "new_tasks": {"new": str(root / task)}},
        "config": {"experts": 2, "steps": 3, "learning_rate": 0.05, "episodes": EPISODES, **config},
    }
    report = mw.train(recipe, quiet=True)
    assert list(report.stages) == ["meta-tune", "adapt"] and "held-out error" in report.stages["adapt"].said
    assert "nearest to one" in report.stages["adapt"].said


def asked(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(build(), [*arguments, "--json"])
    assert result.exit_code == code, result.output + repr(result.exception)
    return json.loads(result.stdout) if code == 0 else str(result.exception)


def test_stage_adapt_leaves_a_classifier_under_the_tasks_name(folder: Path) -> None:
    model = mw.load(folder / "run-vit" / "adapt" / "composition", backbone=folder / "vit")
    assert isinstance(model, FewShotModel) and model.adaptations == ("new",)
    items = sorted((folder / "known").rglob("*.png"))
    names = [item.parent.name for item in items]
    kept, fresh = FewShotClassifier.from_model(model, "new"), FewShotClassifier(model).fit(items, names)
    assert kept.classes_.tolist() == fresh.classes_.tolist()
    pictures = [Image.open(item) for item in items]
    np.testing.assert_allclose(kept.predict_proba(items), fresh.predict_proba(pictures), rtol=1e-4, atol=1e-5)
    assert kept.score(items, names) > 0.8


def test_eval_of_a_support_and_of_domains(folder: Path) -> None:
    where = str(folder / "run-vit" / "meta-tune" / "composition")
    found = asked("eval", where, "--support", str(folder / "known"), "--query", str(folder / "asked"))
    assert found["queries"] == 18 and set(found["systems"]) == {"pretrained", "adapted"}
    adapted = found["systems"]["adapted"]
    assert adapted["low"] <= adapted["accuracy"] <= adapted["high"] and 0 <= adapted["ece"] <= 1
    assert sum(found["experts"].values()) == pytest.approx(1)
    sizes = ("--ways", "3", "--shots", "2", "--episodes", "3")
    found = asked("eval", where, "--data", str(folder / "strokes.npz"), *sizes)
    (domain,) = found["domains"]
    assert domain["adapted"]["episodes"] == 3
    gap = domain["adapted"]["accuracy"] - domain["pretrained"]["accuracy"]
    assert domain["difference"] == pytest.approx(gap, abs=1e-6)
    shown = CliRunner().invoke(build(), ["eval", where, "--data", str(folder / "strokes.npz"), *sizes])
    assert shown.exit_code == 0 and "strokes" in shown.stdout and "+-" in shown.stdout
    assert "both --support and --query" in asked("eval", where, "--support", str(folder / "known"), code=1)


def test_run_says_the_class_of_a_picture_or_a_text(folder: Path) -> None:
    picture = sorted((folder / "known").rglob("*.png"))[0]
    where = str(folder / "run-vit" / "adapt" / "composition")
    found = asked("run", where, "--task", "new", "--file", str(picture))
    kept = FewShotClassifier.from_model(mw.load(where, backbone=folder / "vit"), "new")
    assert found["classes"][0]["class"] == kept.predict([picture])[0]
    best = float(kept.predict_proba([picture]).max())
    assert found["classes"][0]["probability"] == pytest.approx(best, abs=1e-5)
    row = json.loads((folder / "chat.jsonl").read_text().splitlines()[0])
    found = asked("run", str(folder / "run-bert" / "adapt" / "composition"), "--task", "new", "--prompt", row["text"])
    assert sum(entry["probability"] for entry in found["classes"]) == pytest.approx(1, abs=1e-5)
    assert "remembers new" in asked("run", where, "--task", "old", "--file", str(picture), code=1)
