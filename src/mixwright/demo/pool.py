"""The demo's experts: what a user would do for each - a JSONL file, a recipe, `train` - done for every domain found."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from mixwright.api import train
from mixwright.catalog.store import Catalog
from mixwright.demo.corpus import Domain

RANK = 8
EXPERT_STEPS = 32
GATE_STEPS = 16


@dataclass(frozen=True)
class Folders:
    """Where the demo keeps what it makes."""

    root: Path

    @property
    def backbone(self) -> Path:
        """The backbone and its tokenizer."""
        return self.root / "backbone"

    @property
    def catalog(self) -> Path:
        """The experts."""
        return self.root / "experts"

    @property
    def composition(self) -> Path:
        """The composed model."""
        return self.root / "composition"

    @property
    def page(self) -> Path:
        """One document, explained."""
        return self.root / "explained.html"

    @property
    def scores(self) -> Path:
        """The table, as JSON."""
        return self.root / "scores.json"

    @property
    def parts(self) -> Path:
        """What the parts here were made of, so that a second run knows whether they are its own."""
        return self.root / "parts.json"

    def recipe(self, domain: Domain) -> Path:
        """The recipe of a domain's expert."""
        return self.root / "recipes" / f"{domain.name}.yaml"


def write_recipe(folders: Folders, domain: Domain) -> Path:
    """The domain's text as JSONL and the recipe of its expert; its paths are absolute, so that it runs anywhere."""
    texts = folders.root / "text" / f"{domain.name}.jsonl"
    texts.parent.mkdir(parents=True, exist_ok=True)
    texts.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in domain.train), encoding="utf-8")
    path = folders.recipe(domain)
    path.parent.mkdir(parents=True, exist_ok=True)
    recipe = {
        "method": "phatgoose",
        "backbone": {"path": str(folders.backbone.resolve())},
        "catalog": str(folders.catalog.resolve()),
        "output_dir": str((folders.root / "runs" / domain.name).resolve()),
        "expert": {"id": domain.name, "task": f"continue {domain.what}", "licence": "unknown"},
        "data": {"train": str(texts.resolve()), "format": "text", "max_length": 128},
        "train": {"batch_size": 12, "checkpoint_every": 1000},
        # A backbone 128 units wide hardly moves at the paper's scale of 1 / rank.
        "config": {"rank": RANK, "alpha": float(RANK), "expert_steps": EXPERT_STEPS, "gate_steps": GATE_STEPS},
    }
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def make_expert(folders: Folders, domain: Domain, *, quiet: bool) -> None:
    """Train the domain's expert, its gate and its signature; nothing is done for one that is complete."""
    recipe = write_recipe(folders, domain)
    catalog = Catalog(folders.catalog)
    if domain.name in catalog.ids(active=False):
        if catalog.card(domain.name).has_gates:
            return
        train(recipe, stage="gate", quiet=quiet, force=True)
        return
    train(recipe, quiet=quiet, force=True)


def retire_others(folders: Folders, domains: Sequence[Domain]) -> None:
    """Experts of an earlier run that are not in this one's pool act no more."""
    catalog = Catalog(folders.catalog)
    for expert in catalog.ids():
        if expert not in {domain.name for domain in domains}:
            catalog.disable(expert)
