"""A tiny GPT-NeoX and a tiny Mamba-2 with one tokenizer, as folders, and recipes that make hybrids of them."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from mixwright import api
from mixwright.backbones.hf import byte_tokenizer, load_backbone
from mixwright.backbones.tiny import tiny_backbone
from mixwright.data.tasks import Example, TextTask
from mixwright.methods.manticore.config import ManticoreConfig
from mixwright.recipe import BackboneConfig, DataConfig, Recipe, TrainConfig
from mixwright.training.job import Job, open_job
from mixwright.training.run import TrainingReport
from mixwright.training.sources import Texts

NAMES = ("neox", "mamba")
FAMILIES = ("gpt_neox", "mamba2")
SMALL: dict[str, Any] = {
    "projectors": "identity",
    "align_steps": 2,
    "search_steps": 2,
    "tune_steps": 2,
    "choose_every": 1,
    "learning_rate": 1e-3,
    "licences": {"neox": "Apache-2.0", "mamba": "Apache-2.0"},
}
_WORDS = ("red fox", "old tree", "cold sea", "new moon", "grey owl", "last leaf", "long road", "high wall")


def folders(folder: Path) -> list[str]:
    """The two components on a disk, written once."""
    for name, family in zip(NAMES, FAMILIES, strict=True):
        if not (folder / name).exists():
            tiny_backbone(family, seed=len(name)).save_pretrained(folder / name)
            byte_tokenizer().save_pretrained(folder / name)
    return [str(folder / name) for name in NAMES]


def texts(folder: Path, split: str, count: int = 8) -> str:
    """Short texts, others in each split."""
    rows = [{"text": f"{split} {n}: the {_WORDS[n % 8]} and the {_WORDS[(n * 3 + 1) % 8]}."} for n in range(count)]
    path = folder / f"{split}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def recipe_in(
    folder: Path, *, run: str = "run", splits: tuple[str, ...] = ("train", "validation", "test"), **config: Any
) -> Any:
    """A recipe of all stages; `config` are the method's settings."""
    return {
        "method": "manticore",
        "backbones": folders(folder),
        "output_dir": str(folder / run),
        "data": {**{split: texts(folder, split) for split in splits}, "max_length": 24},
        "train": {"batch_size": 4, "log_every": 1},
        "config": {**SMALL, **config},
    }


def train(recipe: Any, **options: Any) -> TrainingReport:
    return api.train(recipe, quiet=True, **options)


def record(folder: Path, stage: str, run: str = "run") -> dict[str, Any]:
    return json.loads((folder / run / stage / "trained.json").read_text())


def findings(folder: Path, stage: str, run: str = "run") -> dict[str, Any]:
    return record(folder, stage, run)["findings"]


def components(folder: Path) -> list[nn.Module]:
    return [load_backbone(path) for path in folders(folder)]


def tiny_pair() -> list[nn.Module]:
    """The two components in memory, without a folder."""
    return [tiny_backbone(family, seed=len(name)) for name, family in zip(NAMES, FAMILIES, strict=True)]


def config_of(**config: Any) -> ManticoreConfig:
    return ManticoreConfig(names=NAMES, **{**SMALL, **config})


def job_in(folder: Path, *, held_out: bool = True, rows: int = 8, batch_size: int = 4, **train: Any) -> Job:
    """A job in memory over the pair; its validation texts are others than those that are trained on."""
    recipe = Recipe(
        backbones=(BackboneConfig(path="a"), BackboneConfig(path="b")),
        output_dir=str(folder),
        train=TrainConfig(batch_size=batch_size, log_every=1, **train),
        data=DataConfig(max_length=16),
    )

    def task(name: str) -> TextTask:
        given = (f"{name} {n}: {_WORDS[n % 8]}" for n in range(rows))
        return TextTask(name, "prompt", tuple(Example(text, target=text[::-1]) for text in given))

    held = (task("other"),) if held_out else ()
    texts = Texts(train=(task("own"),), validation=held, new_tasks={}, mixed=False)
    return open_job(recipe, texts, nn.ModuleList(tiny_pair()), byte_tokenizer())
