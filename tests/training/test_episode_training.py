"""`mw.train` on domains: images and texts, from folders and arrays, through a method that reads episodes."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mixwright as mw
from mixwright.backbones.hf import byte_tokenizer
from mixwright.backbones.tiny import tiny_backbone
from mixwright.config import decode
from mixwright.data.episode_samplers import VariableEpisodes
from mixwright.data.synthetic_episodes import image_domains, text_domains
from mixwright.methods.smat.config import SmatConfig
from mixwright.recipe import DataConfig, EpisodeConfig, Recipe
from mixwright.training.episode_sources import read_domains
from mixwright.training.job import open_episode_job
from mixwright.training.sources import read_texts
from mixwright.yaml12 import parse_yaml

EPISODES = {"ways": [2, 4], "queries": 2, "support": 12, "held_out_episodes": 2, "augment": "shapes"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Backbones, three domains of images as arrays, one as class folders, and two of texts."""
    root = tmp_path_factory.mktemp("domains")
    tiny_backbone("vit").save_pretrained(root / "vit")
    tiny_backbone("bert").save_pretrained(root / "bert")
    byte_tokenizer().save_pretrained(root / "bert")
    for name, domain in image_domains(("strokes", "dots", "cells"), size=16, classes=8, items=5).items():
        pixels = domain.items.permute(0, 2, 3, 1).numpy()
        np.savez(root / f"{name}.npz", images=pixels, labels=np.array(domain.labels))
        for row, label in enumerate(domain.labels if name == "dots" else ()):
            (root / name / f"class-{label}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[row]).save(root / name / f"class-{label}" / f"{row}.png")
    for name, domain in text_domains(("notes", "chat"), classes=5, items=4).items():
        rows = [{"text": text, "label": domain.class_names[at]} for text, at in zip(domain.items, domain.labels)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def recipe(folder: Path, out: Path, backbone: str = "vit", episodes: Any = None, **data: Any) -> dict[str, Any]:
    given = {key: {name: str(folder / place) for name, place in named.items()} for key, named in data.items()}
    return {
        "method": "smat",
        "backbone": str(folder / backbone),
        "output_dir": str(out),
        "data": given or {"domains": {"strokes": str(folder / "strokes.npz"), "dots": str(folder / "dots")}},
        "config": {"experts": 2, "steps": 3, "episodes": {**EPISODES, **(episodes or {})}},
    }


def opened(given: dict[str, Any]) -> Any:
    settings, config = mw_recipe(given), EpisodeConfig(**{**given["config"]["episodes"], "ways": (2, 4)})
    return open_episode_job(
        settings, config, read_domains(settings.data, config, 0), tiny_backbone(Path(given["backbone"]).name)
    )


def mw_recipe(given: dict[str, Any]) -> Recipe:
    return decode(Recipe, given)


def test_a_pool_is_meta_tuned_on_domains_of_images(folder: Path, tmp_path: Path) -> None:
    given = recipe(
        folder, tmp_path, domains={"strokes": "strokes.npz", "dots": "dots"}, held_out_domains={"cells": "cells.npz"}
    )
    report = mw.train(given, quiet=True)
    assert report.domains == {"strokes": 40, "dots": 40} and report.validation_tasks == {"cells": 2}
    assert report.examples == 80 and len(report.stages["meta-tune"].losses) == 3
    loaded = mw.load(report.composition, backbone=folder / "vit")
    assert loaded.composition.config["episodes"]["ways"] == [2, 4]


def test_a_pool_is_meta_tuned_on_domains_of_texts(folder: Path, tmp_path: Path) -> None:
    given = recipe(folder, tmp_path, "bert", domains={"notes": "notes.jsonl", "chat": "chat.jsonl"})
    report = mw.train(given, quiet=True)
    assert report.domains == {"notes": 20, "chat": 20} and report.composition is not None


def test_a_dry_run_counts_one_episode_a_pass(folder: Path, tmp_path: Path) -> None:
    given = {**recipe(folder, tmp_path), "train": {"accumulate": 3}}
    report = mw.train(given, dry_run=True, quiet=True)
    assert [plan.examples_per_step for plan in report.plans] == [3]
    assert report.plans[0].memory["activations"] > 0


def test_a_dry_run_plans_new_tasks_after_meta_tuning(folder: Path, tmp_path: Path) -> None:
    given = recipe(folder, tmp_path, domains={"strokes": "strokes.npz"}, new_tasks={"mine": "dots"})
    report = mw.train(given, dry_run=True, quiet=True)
    assert [plan.name for plan in report.plans] == ["meta-tune", "adapt"] and report.new_tasks == {"mine": 40}
    assert [plan.examples_per_step for plan in report.plans] == [1, 1]
    assert report.plans[1].memory["activations"] == 0


def test_a_dry_run_reads_every_item(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "dots", tmp_path / "dots")
    whole = sorted((tmp_path / "dots").rglob("*.png"))[-1]
    whole.write_bytes(whole.read_bytes()[:-30])
    given = {**recipe(folder, tmp_path / "run"), "data": {"domains": {"dots": str(tmp_path / "dots")}}}
    with pytest.raises(ValueError, match=f"{whole.name}: a damaged image"):
        mw.train(given, dry_run=True, quiet=True)


def test_a_run_that_was_cut_off_goes_on_to_the_same_pool(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = ({**recipe(folder, tmp_path / name), "train": {"checkpoint_every": 1}} for name in ("whole", "cut"))
    mw.train(whole, quiet=True)
    draw = VariableEpisodes.episode

    def cut_off(source: VariableEpisodes, index: int) -> Any:
        if index == 2:
            raise KeyboardInterrupt
        return draw(source, index)

    monkeypatch.setattr(VariableEpisodes, "episode", cut_off)
    with pytest.raises(KeyboardInterrupt):
        mw.train(cut, quiet=True)
    monkeypatch.setattr(VariableEpisodes, "episode", draw)
    mw.train(cut, resume=True, quiet=True)
    pools = [next((tmp_path / name / "meta-tune" / "composition").glob("*.safetensors")) for name in ("whole", "cut")]
    assert pools[0].read_bytes() == pools[1].read_bytes()


def test_training_items_are_augmented_and_others_are_not(folder: Path, tmp_path: Path) -> None:
    given = recipe(
        folder, tmp_path, domains={"dots": "dots"}, held_out_domains={"cells": "cells.npz"}, new_tasks={"new": "dots"}
    )
    job = opened(given)
    assert job.data is not None and job.validation is not None
    one, same = job.data.batch(0), job.data.batch(0)
    assert torch.equal(one.support, same.support)
    assert one.support.shape[1:] == (3, 16, 16)
    plain = job.supports["new"].read(one.meta["rows"][: len(one.labels)])
    assert not torch.equal(one.support, plain)
    held = job.validation.take(job.validation.in_order()[0])
    items = np.load(folder / "cells.npz")["images"]
    row = torch.from_numpy(items[held.meta["rows"][0]]).permute(2, 0, 1)
    assert torch.allclose(held.support[0], row / 127.5 - 1, atol=1e-6)
    assert torch.equal(job.supports["new"].read([0], torch.Generator()), job.supports["new"].read([0]))


def test_classes_can_be_held_out_of_training_domains(folder: Path, tmp_path: Path) -> None:
    given = recipe(folder, tmp_path, episodes={"held_out_classes": 0.25})
    job = opened(given)
    assert job.validation.tasks == {"strokes": 2, "dots": 2} and job.domains == {"strokes": 30, "dots": 30}
    looked = [job.validation.take(part).meta for part in job.validation.in_order()]
    held = {(meta["domain"], name) for meta in looked for name in meta["classes"]}
    trained = {(m["domain"], c) for i in range(30) for m in [job.data.batch(i).meta] for c in m["classes"]}
    assert len(held) == 4 and len(trained) == 12 and not held & trained


def test_domains_are_drawn_as_often_as_their_weights_say(folder: Path, tmp_path: Path) -> None:
    job = opened(recipe(folder, tmp_path, episodes={"weights": {"dots": 9.0}, "queries": 1, "support": 4}))
    names = [job.data.batch(index).meta["domain"] for index in range(60)]
    assert 45 < names.count("dots") < 60


def test_the_identity_of_a_run_names_what_is_read_and_how(folder: Path, tmp_path: Path) -> None:
    base = opened(recipe(folder, tmp_path))
    again = opened(recipe(folder, tmp_path))
    assert base.identity == again.identity
    others = [
        opened(recipe(folder, tmp_path, domains={"strokes": "strokes.npz"})),
        opened(recipe(folder, tmp_path, domains={"strokes": "strokes.npz", "dots": "cells.npz"})),
        opened(recipe(folder, tmp_path, episodes={"queries": 1})),
    ]
    assert len({base.identity["data"], *(other.identity["data"] for other in others)}) == 4
    (folder / "vit" / "preprocessor_config.json").write_text('{"size": 16, "image_mean": 0.1}')
    try:
        assert opened(recipe(folder, tmp_path)).identity["data"] != base.identity["data"]
    finally:
        (folder / "vit" / "preprocessor_config.json").unlink()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {}}, "recipe.data.domains: missing"),
        ({"data": {"train": "x.jsonl"}}, "recipe.data.train: this method reads episodes"),
        (
            {"data": {"domains": {"a": "x.csv"}, "temperature": 2.0}},
            "recipe.data.temperature: this method reads",
        ),
        ({"data": {"domains": {"a": "nothing.csv"}}}, "recipe.data.domains.a: nothing.csv: no such file"),
        ({"data": {"domains": {" ": "nothing.csv"}}}, "recipe.data.domains: a domain without a name"),
        ({"train": {"batch_size": 4}}, "recipe.train.batch_size: an episode is a batch of its own"),
        ({"config": {"episodes": {"ways": [9, 3]}}}, "recipe.config.episodes: ways 9 to 3"),
        ({"config": {"episodes": {"shots": 2}}}, "recipe.config.episodes: ways 5 to 50; with shots it is one number"),
        ({"config": {"episodes": {"shots": 5, "ways": 3}}}, "0 of its 8 classes have 6 distinct items or more"),
        (
            {"config": {"episodes": {"weights": {"cells": 2.0}}}},
            "config.episodes.weights.cells: data.domains has",
        ),
        ({"config": {"episodes": {"way": 3}}}, "did you mean 'ways'"),
        ({"config": {"episodes": {"held_out_classes": 0.1}}}, "both parts need two"),
    ],
)
def test_a_faulty_recipe_is_refused_by_its_key(folder: Path, tmp_path: Path, changes: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        mw.train({**recipe(folder, tmp_path), **changes}, quiet=True)


def test_texts_are_not_for_a_backbone_of_images_nor_the_other_way_round(folder: Path, tmp_path: Path) -> None:
    for backbone, source, said in (
        ("vit", "notes.jsonl", "holds texts, and the backbone reads images"),
        ("bert", "dots", "holds images, and the backbone reads texts"),
    ):
        with pytest.raises(ValueError, match=f"domain a {said}"):
            mw.train(recipe(folder, tmp_path, backbone, domains={"a": source}), quiet=True)


def test_a_domain_has_one_name(folder: Path, tmp_path: Path) -> None:
    given = recipe(folder, tmp_path, domains={"a": "dots"}, held_out_domains={"a": "cells.npz"})
    with pytest.raises(ValueError, match="recipe.data.held_out_domains.a: data.domains has a domain of this name"):
        mw.train(given, quiet=True)


def test_domains_are_not_for_methods_that_read_texts(tmp_path: Path) -> None:
    for key in ("domains", "held_out_domains"):
        with pytest.raises(ValueError, match=f"recipe.data.{key}: this method reads texts"):
            read_texts(DataConfig(**{"train": "x.jsonl", key: {"a": "b"}}))


def test_the_recipe_of_the_method_s_page_is_one() -> None:
    page = Path(mw.__file__).parent / "methods" / "smat" / "README.md"
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found = decode(Recipe, parse_yaml(block, "page"))
    config = decode(SmatConfig, found.config)
    assert found.data.domains and config.episodes.ways == (5, 20) and config.episodes.held_out_classes == 0.2


def test_an_output_folder_that_cannot_be_is_refused_before_training(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"recipe.output_dir: .*file is no folder that can be written to"):
        mw.train(recipe(folder, tmp_path / "file" / "run"), dry_run=True, quiet=True)
    assert (tmp_path / "file").read_text() == "in the way"
