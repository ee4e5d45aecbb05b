"""A recipe with everything that it names opened and checked."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from torch import nn

from mixwright.backbones.hf import provenance
from mixwright.composition.domain_readers import DomainReaders
from mixwright.composition.model import ComposedModel
from mixwright.config import encode
from mixwright.data.batches import Batches
from mixwright.data.collate import Kind, Tokenizer
from mixwright.data.domains import Domain
from mixwright.data.tasks import TextTask
from mixwright.ops.digest import fingerprint
from mixwright.recipe import EpisodeConfig, Recipe, TrainConfig
from mixwright.training.episode_sources import (
    Domains,
    check_items,
    held_out_episodes,
    readable,
    training_episodes,
)
from mixwright.training.sources import Texts, batches


@dataclass(frozen=True, kw_only=True)
class Job:
    """A recipe with everything it names opened. `data`: of `data.train`, `data.tasks` or `data.domains`; None without
    any. Where episodes are read, `supports` are the new tasks, `domains` says how many items each domain has, and there
    is a tokenizer only for texts."""

    recipe: Recipe
    folder: Path
    backbone: nn.Module
    tokenizer: Tokenizer
    kind: Kind
    data: Batches | None
    validation: Batches | None
    new_tasks: Mapping[str, TextTask] = field(default_factory=dict[str, TextTask])
    supports: Mapping[str, Domain] = field(default_factory=dict[str, Domain])
    domains: Mapping[str, int] = field(default_factory=dict[str, int])
    identity: Mapping[str, str]
    load: Callable[[str], ComposedModel] | None = None
    """Opens a composition that an earlier stage left, by its folder; where compositions are trained."""

    @property
    def run(self) -> str:
        """The name of this run: a digest of all that its weights depend on, as far as the recipe says it."""
        text = json.dumps([dict(self.identity), self.recipe.seed, encode(self.recipe.train)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def open_job(recipe: Recipe, texts: Texts, backbone: nn.Module, tokenizer: Tokenizer) -> Job:
    """Make batches of what was read, and name everything that the weights will depend on.

    Raises ValueError naming the key of the recipe, or the task, that is missing or wrong.
    """
    folder = _folder(recipe)
    kind = _kind(recipe, backbone)
    data, validation = (
        batches(recipe, tasks, tokenizer, kind, mixed=texts.mixed) if tasks else None
        for tasks in (texts.train, texts.validation)
    )
    return Job(
        recipe=recipe,
        folder=folder,
        backbone=backbone,
        tokenizer=tokenizer,
        kind=kind,
        data=data,
        validation=validation,
        new_tasks=texts.new_tasks,
        identity=_identity(recipe, backbone, data, validation),
    )


def open_episode_job(
    recipe: Recipe, config: EpisodeConfig, domains: Domains, backbone: nn.Module, *, check: bool = False
) -> Job:
    """Draw episodes from what was read, and name everything that the weights will depend on.

    The tokenizer, and how images are prepared, are those beside the backbone. `check` reads every item now, rather than
    when an episode holds it. Raises as `open_job`, and for domains that the backbone can't read.
    """
    folder, source = _folder(recipe), recipe.sources()[0]
    readers = DomainReaders.beside(
        backbone,
        source.path,
        domains.all(),
        revision=source.revision,
        image_size=config.image_size,
        length=recipe.data.max_length,
    )
    domains = readable(domains, config, readers)
    if check:
        check_items(domains)
    if recipe.train.batch_size not in (1, TrainConfig().batch_size):
        raise ValueError(
            "recipe.train.batch_size: an episode is a batch of its own; leave it out, and say with train.accumulate "
            "how many make a step."
        )
    data = training_episodes(domains, config, recipe.seed) if domains.train else None
    validation = held_out_episodes(domains, config, recipe.seed) if domains.held_out else None
    return Job(
        recipe=recipe,
        folder=folder,
        backbone=backbone,
        tokenizer=cast(Tokenizer, readers.tokenizer),
        kind=_kind(recipe, backbone),
        data=data,
        validation=validation,
        supports=domains.new_tasks,
        domains={name: len(domain) for name, domain in domains.train.items()},
        identity=_identity(recipe, backbone, data, validation),
    )


def _folder(recipe: Recipe) -> Path:
    if recipe.output_dir is None:
        raise ValueError("recipe.output_dir: missing; training needs a folder for its checkpoints.")
    folder = Path(recipe.output_dir).absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"recipe.output_dir: {folder}: {there} is no folder that can be written to; give another.")
    return Path(recipe.output_dir)


def _identity(recipe: Recipe, backbone: nn.Module, data: Batches | None, validation: Batches | None) -> dict[str, str]:
    """Everything that the weights will depend on."""
    return {
        "method": recipe.method,
        **{f"config.{key}": json.dumps(value) for key, value in sorted(recipe.config.items())},
        "backbone": fingerprint(backbone),
        "data": "none" if data is None else data.digest,
        "validation": "none" if validation is None else validation.digest,
    }


def _kind(recipe: Recipe, backbone: nn.Module) -> Kind:
    if isinstance(backbone, nn.ModuleList):
        return "causal"  # several pretrained models are language models
    named = recipe.sources()[0].kind
    kind = named if named != "auto" else provenance(backbone)["kind"]
    if kind not in ("causal", "seq2seq", "encoder"):
        raise ValueError(f"recipe.backbone.kind: {kind}; training knows causal, seq2seq and encoder.")
    return kind
