"""A recipe with everything that it names opened and checked."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from mixwright.backbones.hf import provenance
from mixwright.composition.model import ComposedModel
from mixwright.config import encode
from mixwright.data.batches import Batches
from mixwright.data.collate import Kind, Tokenizer
from mixwright.data.tasks import TextTask
from mixwright.ops.digest import fingerprint
from mixwright.recipe import Recipe
from mixwright.training.sources import Texts, batches


@dataclass(frozen=True, kw_only=True)
class Job:
    """A recipe with everything it names opened. `data`: of `data.train` or `data.tasks`; None without either."""

    recipe: Recipe
    folder: Path
    backbone: nn.Module
    tokenizer: Tokenizer
    kind: Kind
    data: Batches | None
    validation: Batches | None
    new_tasks: Mapping[str, TextTask] = field(default_factory=dict[str, TextTask])
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
    if recipe.output_dir is None:
        raise ValueError("recipe.output_dir: missing; training needs a folder for its checkpoints.")
    kind = _kind(recipe, backbone)
    data, validation = (
        batches(recipe, tasks, tokenizer, kind, mixed=texts.mixed) if tasks else None
        for tasks in (texts.train, texts.validation)
    )
    identity = {
        "method": recipe.method,
        **{f"config.{key}": json.dumps(value) for key, value in sorted(recipe.config.items())},
        "backbone": fingerprint(backbone),
        "data": "none" if data is None else data.digest,
        "validation": "none" if validation is None else validation.digest,
    }
    return Job(
        recipe=recipe,
        folder=Path(recipe.output_dir),
        backbone=backbone,
        tokenizer=tokenizer,
        kind=kind,
        data=data,
        validation=validation,
        new_tasks=texts.new_tasks,
        identity=identity,
    )


def _kind(recipe: Recipe, backbone: nn.Module) -> Kind:
    if isinstance(backbone, nn.ModuleList):
        return "causal"  # several pretrained models are language models
    named = recipe.sources()[0].kind
    kind = named if named != "auto" else provenance(backbone)["kind"]
    if kind not in ("causal", "seq2seq", "encoder"):
        raise ValueError(f"recipe.backbone.kind: {kind}; training knows causal, seq2seq and encoder.")
    return kind
