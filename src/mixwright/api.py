"""The calls a user makes: `mw.compose`, `mw.train`, `mw.load`, `mw.evaluate`. Only here methods meet the rest."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mixwright import artifact
from mixwright import config as configuration
from mixwright.backbones.hf import load_backbone, load_tokenizer
from mixwright.catalog.store import Catalog
from mixwright.composition.model import ComposedModel
from mixwright.methods.base import load as load_method
from mixwright.recipe import Recipe, read_recipe
from mixwright.training.job import open_job
from mixwright.training.run import TrainingReport, run_stages
from mixwright.training.sign import sign


def compose(
    method: str,
    *,
    backbone: nn.Module | str | Path,
    catalog: Catalog | str | Path | None = None,
    **config: Any,
) -> ComposedModel:
    """One model by a method's name, out of a backbone (a model, a folder or a hub id) and a catalogue's active experts.

    `config` are fields of the method's config dataclass; an unknown one is refused with the nearest name. The backbone
    is frozen and gets its mixtures in place; `model.remove()` gives it back as it was.
    """
    card = load_method(method)
    settings = configuration.decode(card.config, config, where=f"{method} config")
    model = backbone if isinstance(backbone, nn.Module) else load_backbone(str(backbone))
    shelf = Catalog(catalog) if isinstance(catalog, str | Path) else catalog
    return card.compose(settings, [model], shelf)


def train(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    stage: str | None = None,
    resume: bool = False,
    force: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
) -> TrainingReport:
    """Train an expert as a recipe (a value, a mapping, or a YAML file) says, and put it into the recipe's catalogue.

    `stage` runs one of the method's stages alone. `resume` goes on where the same run was cut off, to the same weights.
    `force` continues a run in spite of changed settings or, without `resume`, starts it over. `dry_run` opens and
    checks everything, and says what training would need. Under torchrun every process calls this.

    Raises ValueError for a fault in the recipe or the data (key, or file and line), CatalogError for a refusal.
    """
    settings = _recipe(recipe)
    if settings.catalog is None:
        raise ValueError("recipe.catalog: missing; training needs the folder that the expert is put into.")
    card = load_method(settings.method)
    stages = card.stages(configuration.decode(card.config, settings.config, where="recipe.config"))
    source = settings.backbone
    backbone = load_backbone(
        source.path,
        revision=source.revision,
        dtype=source.dtype,
        kind=source.kind,
        device_map=source.device_map,
    )
    tokenizer = load_tokenizer(source.path, revision=source.revision)
    job = open_job(settings, backbone, tokenizer, Catalog(settings.catalog, backbone))
    report = run_stages(job, stages, only=stage, resume=resume, force=force, dry_run=dry_run, quiet=quiet)
    if not dry_run and stage in (None, stages[-1].name):
        sign(job)
    return report


def load(
    folder_or_repo: str | Path,
    *,
    backbone: nn.Module | str | Path | None = None,
    revision: str | None = None,
    device_map: Any = None,
    dtype: Any = None,
) -> ComposedModel:
    """The composed model that `save_pretrained` or `push_to_hub` wrote: see `mixwright.artifact.load`."""
    return artifact.load(folder_or_repo, backbone=backbone, revision=revision, device_map=device_map, dtype=dtype)


def _recipe(recipe: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return configuration.decode(Recipe, recipe)
    return read_recipe(recipe)
