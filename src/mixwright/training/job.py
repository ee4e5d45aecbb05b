"""A recipe with everything that it names opened and checked."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from mixwright.backbones.hf import provenance
from mixwright.catalog.store import Catalog
from mixwright.config import encode
from mixwright.data.batches import Batches, make_batches
from mixwright.data.collate import Kind, Tokenizer
from mixwright.data.tasks import TextTask, read_task
from mixwright.ops.digest import fingerprint
from mixwright.recipe import ExpertConfig, Recipe
from mixwright.sites import linear_sites


@dataclass(frozen=True, kw_only=True)
class Job:
    """A recipe with everything it names opened."""

    recipe: Recipe
    expert: ExpertConfig
    folder: Path
    backbone: nn.Module
    kind: Kind
    transposed: bool
    """Whether the backbone's layers store their weights as (d_in, d_out), which PEFT wants to be told."""
    catalog: Catalog
    data: Batches
    validation: Batches | None
    identity: Mapping[str, str]

    @property
    def run(self) -> str:
        """The name of this run: a digest of all that its weights depend on, as far as the recipe says it."""
        text = json.dumps([dict(self.identity), self.recipe.seed, encode(self.recipe.train)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def open_job(recipe: Recipe, backbone: nn.Module, tokenizer: Tokenizer, catalog: Catalog) -> Job:
    """Read and check the data, and name everything that the weights will depend on.

    Raises ValueError naming the key of the recipe, or the file and line, that is missing or wrong.
    """
    if recipe.expert is None:
        raise ValueError("recipe.expert: missing; training needs the id of the expert that it makes.")
    if recipe.output_dir is None:
        raise ValueError("recipe.output_dir: missing; training needs a folder for its checkpoints.")
    if recipe.data.train is None:
        raise ValueError("recipe.data.train: missing; training needs examples.")
    kind = _kind(recipe, backbone)
    task = _read(recipe, "train", recipe.data.train, None)
    source = recipe.data.validation
    held_out = _read(recipe, "validation", source, task) if source else None
    data = _batches(recipe, task, tokenizer, kind)
    validation = _batches(recipe, held_out, tokenizer, kind) if held_out else None
    identity = {
        "method": recipe.method,
        **{f"config.{key}": json.dumps(value) for key, value in sorted(recipe.config.items())},
        "backbone": fingerprint(backbone),
        "data": data.digest,
        "validation": "none" if validation is None else validation.digest,
    }
    return Job(
        recipe=recipe,
        expert=recipe.expert,
        folder=Path(recipe.output_dir),
        backbone=backbone,
        kind=kind,
        transposed=any(site.transposed for site in linear_sites(backbone).values()),
        catalog=catalog,
        data=data,
        validation=validation,
        identity=identity,
    )


def _kind(recipe: Recipe, backbone: nn.Module) -> Kind:
    kind = recipe.backbone.kind if recipe.backbone.kind != "auto" else provenance(backbone)["kind"]
    if kind not in ("causal", "seq2seq", "encoder"):
        raise ValueError(f"recipe.backbone.kind: {kind}; training knows causal, seq2seq and encoder.")
    return kind


def _read(recipe: Recipe, split: str, source: str | tuple[str, ...], like: TextTask | None) -> TextTask:
    """A split of the recipe's data; `like` gives the format and the labels that it must share."""
    data = recipe.data
    labels = data.labels if like is None else like.labels or None
    return read_task(
        source,
        format=data.format if like is None else like.format,
        split="train" if split == "train" else "validation",
        labels=labels,
        limit=data.limit,
    )


def _batches(recipe: Recipe, task: TextTask, tokenizer: Tokenizer, kind: Kind) -> Batches:
    data = recipe.data
    return make_batches(
        task,
        tokenizer,
        kind,
        batch_size=recipe.train.batch_size,
        seed=recipe.seed,
        max_length=data.max_length,
        max_target_length=data.max_target_length,
    )
