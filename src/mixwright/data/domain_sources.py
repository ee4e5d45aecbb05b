"""What a name in a recipe stands for: the domain in a folder, an archive, a table, arrays, or a hub data set."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from mixwright.data.arrays import idx_domain, npz_domain
from mixwright.data.class_folders import archive_domain, folder_domain
from mixwright.data.domain_tables import hub_domain, table_domain
from mixwright.data.domains import Domain
from mixwright.data.encoded import Encoded
from mixwright.data.tasks import SPLIT_FILES, folder_labels

Split = Literal["train", "validation", "test"]
_TABLES = (".jsonl", ".csv", ".tsv")
_IDX = {"train": "train-images", "validation": "t10k-images", "test": "t10k-images"}


def read_domain(name: str, source: str | Path | Sequence[str | Path], *, split: Split = "train") -> Domain:
    """The domain that a source names: class folders (or a .zip of them), a .jsonl, .csv or .tsv table, an .npz file,
    MNIST's .gz files, a hub data set `owner/name[:configuration]`, or several of these.

    A folder may hold splits, as folders or tables called `train`, `validation` and `test`; `#test` at the end of a
    source takes one in place of `split`. Raises ValueError naming what is missing or wrong.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    if not sources:
        raise ValueError(f"domain {name}: an empty list of sources; name one.")
    parts = [_with_contents(_read(name, str(one), split)) for one in sources]
    domain = parts[0] if len(parts) == 1 else _joined(name, parts)
    if len(set(domain.labels)) < 2:
        raise ValueError(
            f"{', '.join(map(str, sources))}: {len(set(domain.labels))} class with items; a domain needs two or more."
        )
    return domain


def has_split(source: str | Path | Sequence[str | Path], split: Split) -> bool:
    """Whether every part of a source is a folder with this split, and names no other."""
    sources = [source] if isinstance(source, str | Path) else source
    return all("#" not in str(one) and _split_of(Path(one), split) is not None for one in sources)


def _read(name: str, source: str, split: Split) -> Domain:
    whole = Path(source).expanduser().exists()  # a name may have a # of its own
    path, _, part = (source, "", "") if whole else source.rpartition("#") if "#" in source else (source, "", "")
    place = Path(path).expanduser()
    if place.is_dir():
        return _folder(name, place, part or split, asked=bool(part))
    if place.is_file():
        return _file(name, place)
    known = place.suffix in (*_TABLES, ".zip", ".npz", ".gz")
    if known or place.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
        raise ValueError(
            f"{path}: no such file or folder; give class folders, a .zip, .jsonl, .csv or .npz file, or a hub id "
            "owner/name."
        )
    return hub_domain(name, source, split)


def _folder(name: str, folder: Path, split: str, *, asked: bool) -> Domain:
    there = _split_of(folder, split)
    if there is None and asked:
        raise ValueError(f"{folder}: no split {split!r}; expected a folder, or a table, of that name in it.")
    if there is not None:
        return folder_domain(name, there) if there.is_dir() else _file(name, there)
    if split == "train" and not asked and (other := _split_of(folder, "test")) is not None:
        raise ValueError(f"{folder}: no train split, only {other.name}; write {folder}#test to mean that.")
    return folder_domain(name, folder)


def _split_of(folder: Path, split: str) -> Path | None:
    """A folder's split: a folder or a file."""
    if not folder.is_dir():
        return None
    names = SPLIT_FILES.get(split, (split,))
    tables = [f"{name}{suffix}" for name in names for suffix in _TABLES]
    arrays = [f"{_IDX[split]}-idx3-ubyte{suffix}" for suffix in (".gz", "")] if split in _IDX else []
    candidates = [*names, *tables, *(f"{name}.npz" for name in names), *arrays]
    return next((folder / name for name in candidates if (folder / name).exists()), None)


def _file(name: str, path: Path) -> Domain:
    if path.suffix in _TABLES:
        return table_domain(name, path, folder_labels(path.parent))
    if path.suffix == ".zip":
        return archive_domain(name, path)
    if path.suffix == ".npz":
        return npz_domain(name, path)
    if "idx3" in path.name:
        return idx_domain(name, path)
    raise ValueError(f"{path}: not a file that domains are read from; expected .jsonl, .csv, .tsv, .zip or .npz.")


def _with_contents(domain: Domain) -> Domain:
    """The domain with a name for the content of each of its files."""
    if domain.keys or not isinstance(domain.items[0] if len(domain) else None, Encoded):
        return domain
    return replace(domain, keys=[hashlib.sha256(item.read()).hexdigest() for item in domain.items])


def _joined(name: str, parts: Sequence[Domain]) -> Domain:
    """Several parts as one domain; classes of one name are one class."""
    if any(isinstance(part.items, Tensor) for part in parts):
        raise ValueError(f"domain {name}: arrays are not joined with other sources; give one source.")
    if len({type(part.items[0]) for part in parts}) > 1:
        raise ValueError(f"domain {name}: one source holds texts and another images; a domain is of one kind.")
    names = tuple(dict.fromkeys(label for part in parts for label in part.class_names))
    groups = {label: group for part in parts for label, group in zip(part.class_names, part.groups)}
    return Domain(
        name,
        [item for part in parts for item in part.items],
        [names.index(part.class_names[label]) for part in parts for label in part.labels],
        names,
        tuple(groups.get(label, "") for label in names) if groups else (),
        keys=[key for part in parts for key in part.contents],
    )
