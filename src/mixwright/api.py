"""The calls a user makes: `mw.compose`, `mw.train`, `mw.load`, `mw.evaluate`. Only here methods meet the rest."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from mixwright import artifact
from mixwright import config as configuration
from mixwright.backbones.hf import load_backbone, load_tokenizer, provenance
from mixwright.catalog.store import Catalog
from mixwright.composition.components import tokenizer_of
from mixwright.composition.model import ComposedModel
from mixwright.data.batches import make_batches
from mixwright.data.tasks import read_task
from mixwright.evaluation.evaluate import evaluate as score
from mixwright.evaluation.quality import measure_quality
from mixwright.evaluation.systems import members
from mixwright.evaluation.table import Table
from mixwright.evaluation.tasks import chosen_systems, default_systems, file_tasks
from mixwright.methods.base import Method
from mixwright.methods.base import load as load_method
from mixwright.recipe import Recipe, read_recipe
from mixwright.training.compositions import check_composition, train_composition, with_task_names
from mixwright.training.episode_sources import read_domains
from mixwright.training.experts import check_expert, open_shelf, train_expert
from mixwright.training.job import open_episode_job, open_job
from mixwright.training.run import Request, TrainingReport
from mixwright.training.sign import sign_expert, signature_of
from mixwright.training.sources import Texts, read_texts


def compose(
    method: str,
    backbone: nn.Module | str | Path | None = None,
    *,
    backbones: Sequence[nn.Module | str | Path] | None = None,
    catalog: Catalog | str | Path | None = None,
    **config: Any,
) -> ComposedModel:
    """One model by a method's name, out of a backbone (a model, a folder or a hub id) and a catalogue's active experts.

    `backbones`: several, for a method that composes them.

    `config` are fields of the method's config dataclass; an unknown one is refused with the nearest name. The backbone
    is frozen and gets its mixtures in place; `model.remove()` gives it back as it was.
    """
    card = load_method(method)
    functions = {key: value for key, value in config.items() if callable(value)}  # no file can hold them
    plain = {key: value for key, value in config.items() if key not in functions}
    settings = replace(configuration.decode(card.config, plain, where=f"{method} config"), **functions)
    given = _backbones(card, backbone, backbones)
    models = [model if isinstance(model, nn.Module) else load_backbone(str(model)) for model in given]
    shelf = Catalog(catalog) if isinstance(catalog, str | Path) else catalog
    return card.compose(settings, models, shelf)


def train(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    stage: str | None = None,
    resume: bool = False,
    force: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
) -> TrainingReport:
    """Train as a recipe (a value, a mapping, or a YAML file) says.

    A method that trains experts puts one into the recipe's catalogue. One that trains compositions saves what each
    stage comes to in `output_dir/<stage>/composition`, for `load`; its stages are those whose data the recipe has.

    `stage` runs one of the method's stages alone. `resume` goes on where the same run was cut off, to the same weights.
    `force` continues a run in spite of changed settings or, without `resume`, starts it over. `dry_run` opens and
    checks everything, and says what training would need. Under torchrun every process calls this.

    Raises ValueError for a fault in the recipe or the data (key, or file and line), CatalogError for a refusal.
    """
    settings = _recipe(recipe)
    card = load_method(settings.method)
    if card.trains == "composition":
        settings = with_task_names(_with_stored_config(settings), card.config)
    config = configuration.decode(card.config, settings.config, where="recipe.config")
    stages = card.stages(config)
    (check_composition if card.trains == "composition" else check_expert)(settings)
    sources = settings.sources(card.backbones)
    read = (
        read_domains(settings.data, config.episodes, settings.seed)
        if card.reads == "episodes"
        else read_texts(settings.data)
    )
    loaded = [
        load_backbone(
            source.path,
            revision=source.revision,
            dtype=source.dtype,
            kind=source.kind,
            device_map=source.device_map,
        )
        for source in sources
    ]
    backbone = loaded[0] if card.backbones == "one" else nn.ModuleList(loaded)
    if isinstance(read, Texts):
        job = open_job(settings, read, backbone, load_tokenizer(sources[0].path, revision=sources[0].revision))
    else:
        job = open_episode_job(settings, config.episodes, read, backbone, check=dry_run)
    request = Request(only=stage, resume=resume, force=force, dry_run=dry_run, quiet=quiet)
    if card.trains == "composition":
        return train_composition(job, stages, _onto, request)
    shelf = open_shelf(settings, backbone)
    report = train_expert(job, shelf, stages, request)
    if not dry_run and stage in (None, stages[-1].name):
        sign_expert(job, shelf)
    return report


def load(
    folder_or_repo: str | Path,
    *,
    backbone: artifact.Given | Sequence[artifact.Given | None] | None = None,
    revision: str | None = None,
    device_map: Any = None,
    dtype: Any = None,
) -> ComposedModel:
    """The composed model that `save_pretrained` or `push_to_hub` wrote: see `mixwright.artifact.load`."""
    return artifact.load(folder_or_repo, backbone=backbone, revision=revision, device_map=device_map, dtype=dtype)


def convert(
    backbone: nn.Module | str | Path,
    data: Any = None,
    *,
    sites: str | Sequence[str] = "all",
    top_k: int | None = None,
    keep: int = 0,
    grid: tuple[int, int] | None = None,
    dim_key: int = 64,
    gate: Literal["one", "sigmoid"] = "one",
    fit_steps: int = 400,
    tokens: int = 16384,
    seed: int = 0,
) -> ComposedModel:
    """A backbone (a model, a folder or a hub id) with its feed-forward layers as PEER layers of their own neurons.

    With `top_k` None it is the backbone up to rounding; see `mixwright.methods.peer.conversion.convert` for what is
    given, and `Conversion` there for the same step by step.
    """
    from mixwright.methods.peer.conversion import convert as convert_layers

    base = backbone if isinstance(backbone, nn.Module) else load_backbone(str(backbone))
    options: dict[str, Any] = {"sites": sites, "top_k": top_k, "keep": keep, "grid": grid, "dim_key": dim_key}
    return convert_layers(base, data, **options, gate=gate, fit_steps=fit_steps, tokens=tokens, seed=seed)


def from_peft_poly(
    folder_or_repo: str | Path,
    *,
    backbone: nn.Module | str | Path,
    tasks: Sequence[str] | None = None,
    revision: str | None = None,
    noise: bool = True,
    confirm_base: bool = False,
) -> ComposedModel:
    """The model that PEFT makes of a Poly or MHR adapter, with equal outputs, on its backbone.

    `backbone`: a model, a folder or a hub id. `tasks` names the rows of its router, in order; else they are task-0,
    task-1, ... In training PEFT always draws noise, and so does this model; `noise=False` trains on without. See
    `methods.tensorpoly.peft_poly` for what is refused.
    """
    from mixwright.methods.tensorpoly.peft_poly import from_peft_poly as read

    base = backbone if isinstance(backbone, nn.Module) else load_backbone(str(backbone))
    return read(folder_or_repo, base, tasks, revision=revision, noise=noise, confirm_base=confirm_base)


def evaluate(
    model: ComposedModel,
    data: str | Path | Sequence[str | Path],
    *,
    tokenizer: Any = None,
    systems: Sequence[str] | None = None,
    of_tasks: Sequence[str | int] | None = None,
    batch_size: int = 16,
    max_length: int = 512,
    limit: int | None = None,
    seed: int = 0,
) -> Table:
    """The backbone, each expert, merges, baselines and the routed model on the same examples, with one model in memory.

    `data`: JSONL files, folders or hub ids, one task each. `tokenizer`: the one beside the backbone unless given.
    `systems`: all that the experts allow unless given. `of_tasks`: for a model that is routed by task, the tasks it
    knows that the files are of, one for each or one for all; the files' own names unless given.
    """
    sources = [data] if isinstance(data, str | Path) else data
    reader = tokenizer or _tokenizer(model)
    files = [str(source) for source in sources]
    names = default_systems(model) if systems is None else systems
    tasks = file_tasks(
        model, reader, files, batch_size=batch_size, max_length=max_length, limit=limit, of_tasks=of_tasks
    )
    table = score(model, tasks, chosen_systems(model, names, seed=seed), seed=seed)
    return table.with_best_experts([model.experts[at] for at in members(model)]) if "experts" in names else table


def measure(
    catalog: Catalog | str | Path,
    expert: str,
    *,
    backbone: nn.Module | str | Path,
    held_out: str | Path,
    general: str | Path | None = None,
    tokenizer: Any = None,
    limit: int | None = 256,
) -> dict[str, Any]:
    """Measure an expert's quality and write it on its card: what `mixwright experts measure` does.

    `held_out`: text of the expert's own task that it has not seen. `general`: text on which it should do no harm. The
    result is described at `mixwright.evaluation.quality.measure_quality`.
    """
    shelf = Catalog(catalog) if isinstance(catalog, str | Path) else catalog
    base = backbone if isinstance(backbone, nn.Module) else load_backbone(str(backbone))
    model = compose("phatgoose", backbone=base, catalog=shelf, top_k=1)
    try:
        model.index(expert)
        reader = tokenizer or _tokenizer(model)
        (own,) = file_tasks(model, reader, [str(held_out)], limit=limit)
        wide = None if general is None else file_tasks(model, reader, [str(general)], limit=limit)[0]
        gates = {other: found for other in shelf.ids() if (found := shelf.expert(other).gates) is not None}
        quality = measure_quality(model, expert, held_out=own, general=wide, gates=gates)
    finally:
        model.remove()
    shelf.attach(expert, quality=quality)
    return quality


def sign(
    catalog: Catalog | str | Path,
    expert: str,
    *,
    backbone: nn.Module | str | Path,
    text: str | Path,
    tokenizer: Any = None,
    max_length: int = 512,
    limit: int | None = 256,
) -> int:
    """Give an expert a signature: statistics of the backbone's activations on `text`, which should be of its own kind.

    With signatures for every expert, adapters that came without gates can be routed: see `router="signatures"`. Returns
    the number of sites.
    """
    shelf = Catalog(catalog) if isinstance(catalog, str | Path) else catalog
    base = backbone if isinstance(backbone, nn.Module) else load_backbone(str(backbone))
    reader = tokenizer or load_tokenizer(str(backbone))
    task = read_task(text, limit=limit)
    data = make_batches(task, reader, provenance(base)["kind"], batch_size=8, seed=0, max_length=max_length)
    shelf.bind(base)
    signatures = signature_of(base, data, list(shelf.card(expert).sites))
    shelf.attach(expert, signatures=signatures)
    return len(signatures)


def _backbones(card: Method, one: Any, several: Sequence[Any] | None) -> Sequence[Any]:
    """What is composed. Raises ValueError where it is not as many as the method takes."""
    if card.backbones == "several":
        if several is None or isinstance(several, str | Path | nn.Module) or one is not None:
            raise ValueError(f"{card.name} composes several models: compose({card.name!r}, backbones=[first, second]).")
        return several
    if several is not None or one is None:
        raise ValueError(f"{card.name} composes one model: compose({card.name!r}, backbone=...).")
    return [one]


def _onto(folder: str, base: nn.Module) -> ComposedModel:
    """A saved composition on the backbone of a run; several models are trained themselves, so copies of theirs are."""
    return artifact.load(folder, backbone=copy.deepcopy(base) if isinstance(base, nn.ModuleList) else base)


def _tokenizer(model: ComposedModel) -> Any:
    path = model.composition.backbone.get("path")
    own = None if path else tokenizer_of(model)
    if own is not None:
        return own
    if not path:
        raise ValueError("the backbone was built in memory and has no tokenizer beside it; give tokenizer=.")
    return load_tokenizer(path, revision=model.composition.backbone.get("revision"))


def _with_stored_config(recipe: Recipe) -> Recipe:
    """A recipe that starts from a composition has the config it was saved with, as far as it gives no other."""
    if recipe.composition is None:
        return recipe
    stored = artifact.stored_at(recipe.composition)
    if stored.method != recipe.method:
        raise ValueError(
            f"recipe.composition: {recipe.composition} was composed by {stored.method}, and recipe.method is "
            f"{recipe.method}."
        )
    return replace(recipe, config={**stored.config, **recipe.config})


def _recipe(recipe: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return configuration.decode(Recipe, recipe)
    return read_recipe(recipe)
