"""The text that a recipe names, read: one task or several, for training, for choosing, and few examples of new ones."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from mixwright.data.batches import Batches, make_batches
from mixwright.data.collate import Kind, Tokenizer
from mixwright.data.mixture import mix_batches
from mixwright.data.tasks import SPLIT_FILES, TextTask, read_task
from mixwright.recipe import DataConfig, Recipe, Source

Split = Literal["train", "validation"]


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What was read. `mixed`: the tasks of `train` and `validation` are learned together, each under its own name."""

    train: tuple[TextTask, ...]
    validation: tuple[TextTask, ...]
    new_tasks: Mapping[str, TextTask]
    mixed: bool


def read_texts(data: DataConfig) -> Texts:
    """Read and check all text for training. Raises ValueError naming the key, or the file and line, that is wrong."""
    for key, given in (("domains", data.domains), ("held_out_domains", data.held_out_domains)):
        if given is not None:
            raise ValueError(f"recipe.data.{key}: this method reads texts; name them under train or tasks.")
    if data.train is not None and data.tasks is not None:
        raise ValueError("recipe.data.tasks: data.train is given too; name what is trained on in one of them.")
    if data.train is None and data.tasks is None and not data.new_tasks:
        raise ValueError("recipe.data.train: missing; training needs examples (train, tasks or new_tasks).")
    new = _by_name(data, "new_tasks", data.new_tasks or {})
    if data.tasks is not None:
        return _texts_of_tasks(data, data.tasks, new)
    train = () if data.train is None else (_read(data, "train", data.train, None),)
    held_out = () if data.validation is None else tuple(_read(data, "validation", data.validation, t) for t in train)
    return Texts(train=train, validation=held_out, new_tasks=new, mixed=False)


def batches(recipe: Recipe, tasks: tuple[TextTask, ...], tokenizer: Tokenizer, kind: Kind, *, mixed: bool) -> Batches:
    """The batches in which tasks are learned, as the recipe says."""
    data, size, seed = recipe.data, recipe.train.batch_size, recipe.seed
    make = partial(mix_batches, tasks, temperature=data.temperature, cap=data.size_cap)
    return (make if mixed else partial(make_batches, tasks[0]))(
        tokenizer,
        kind,
        batch_size=size,
        seed=seed,
        max_length=data.max_length,
        max_target_length=data.max_target_length,
    )


def _texts_of_tasks(data: DataConfig, sources: Mapping[str, Source], new: Mapping[str, TextTask]) -> Texts:
    if not sources:
        raise ValueError("recipe.data.tasks: empty; name at least one task.")
    if data.validation is not None:
        raise ValueError(
            "recipe.data.validation: the held-out examples of data.tasks are each task's own; put a validation.jsonl "
            "into its folder."
        )
    both = sorted(set(new) & set(sources))
    if both:
        raise ValueError(f"recipe.data.new_tasks.{both[0]}: data.tasks has a task of this name; choose another.")
    train = _by_name(data, "tasks", sources)
    held_out = {name: train[name] for name, source in sources.items() if _has_validation(source)}
    validation = tuple(_named(data, f"tasks.{n}", "validation", sources[n], like) for n, like in held_out.items())
    return Texts(train=tuple(train.values()), validation=validation, new_tasks=new, mixed=True)


def _by_name(data: DataConfig, key: str, sources: Mapping[str, Source]) -> dict[str, TextTask]:
    if any(not name.strip() for name in sources):
        raise ValueError(f"recipe.data.{key}: a task without a name.")
    return {name: _named(data, f"{key}.{name}", "train", source, None) for name, source in sources.items()}


def _named(data: DataConfig, key: str, split: Split, source: Source, like: TextTask | None) -> TextTask:
    """A split of one of several tasks, under the name that the recipe gives it."""
    try:
        return replace(_read(data, split, source, like), name=key.partition(".")[2])
    except ValueError as error:
        raise ValueError(f"recipe.data.{key}: {error}") from error


def _read(data: DataConfig, split: Split, source: Source, like: TextTask | None) -> TextTask:
    """A split of a task; `like` gives the format and the labels that it must share."""
    labels = data.labels if like is None else like.labels or None
    form = data.format if like is None else like.format
    return read_task(source, format=form, split=split, labels=labels, limit=data.limit)


def _has_validation(source: Source) -> bool:
    """Whether every part of a task's source is a folder with a validation split."""
    parts = [Path(part) for part in ([source] if isinstance(source, str) else source)]
    names = [f"{name}{suffix}" for name in SPLIT_FILES["validation"] for suffix in (".jsonl", ".txt")]
    return all(any((part / name).is_file() for name in names) for part in parts)
