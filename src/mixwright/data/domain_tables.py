"""Domains from tables: rows with `image` or `text`, `label`, and perhaps `domain` and `group`."""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mixwright.data.domains import Domain
from mixwright.data.encoded import Encoded
from mixwright.data.tasks import Row, json_lines, open_hub
from mixwright.errors import MissingExtra

_CONTENT = ("image", "img", "text")


def table_domain(name: str, path: Path, class_names: Sequence[str] = ()) -> Domain:
    """The domain of a .jsonl, .csv or .tsv file; images are paths from the file's folder.

    Where rows have a `domain`, those of the one called `name` are taken. Labels are texts, or numbers in `class_names`.
    Raises ValueError naming file and line.
    """
    rows = json_lines(path) if path.suffix == ".jsonl" else _separated(path)
    return _domain(name, rows, path.parent, class_names, str(path))


def hub_domain(name: str, source: str, split: str) -> Domain:
    """The domain of a hub data set with `image` or `text`, and `label`. Raises ValueError; MissingExtra (`data`)."""
    try:
        table = open_hub(source, split)
    except MissingExtra:
        raise
    except Exception as error:  # whatever the hub's client says to a name that it does not know
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{source}: no such folder here, and the hub did not give it ({said:.200}).") from error
    for column, feature in table.features.items():
        if type(feature).__name__ == "Image":
            table = table.cast_column(column, type(feature)(decode=False))
    names = getattr(table.features.get("label"), "names", None) or ()
    rows = ((f"{source}:{number}", row) for number, row in enumerate(table))
    return _domain(name, rows, Path(), tuple(names), source)


@dataclass(frozen=True, slots=True)
class _Read:
    item: Encoded | str
    label: str | int
    group: str | None


def _domain(name: str, rows: Iterable[Row], folder: Path, class_names: Sequence[str], source: str) -> Domain:
    chosen = _of_domain(name, list(rows), source)
    key = next((key for key in _CONTENT if key in chosen[0][1]), None)
    if key is None:
        columns = ", ".join(map(str, chosen[0][1])) or "none"
        raise ValueError(f"{chosen[0][0]}: columns {columns}; expected image or text, and label.")
    read = [_read(where, row, key, folder) for where, row in chosen]
    names, numbers = _numbers([one.label for one in read], class_names, [where for where, _ in chosen])
    groups = _groups(numbers, [one.group for one in read], names, source)
    return Domain(name, [one.item for one in read], numbers, names, groups)


def _of_domain(name: str, rows: list[Row], source: str) -> list[Row]:
    """The rows of one domain, where they say which."""
    if not rows:
        raise ValueError(f"{source}: no rows; give a line for each item.")
    if "domain" not in rows[0][1]:
        return rows
    chosen = [row for row in rows if str(row[1].get("domain")) == name]
    if not chosen:
        there = ", ".join(sorted({str(row.get("domain")) for _, row in rows})[:8])
        raise ValueError(f"{source}: no row of domain {name!r}; its rows are of {there}. Call the domain as they do.")
    return chosen


def _read(where: str, row: Mapping[str, Any], key: str, folder: Path) -> _Read:
    label, group = row.get("label"), row.get("group")
    if isinstance(label, bool) or not isinstance(label, int | str) or label == "":
        raise ValueError(f"{where}: label {label!r}; expected the name of a class, or its number.")
    return _Read(_item(where, row.get(key), key, folder), label, None if group is None else str(group))


def _item(where: str, value: Any, key: str, folder: Path) -> Encoded | str:
    if isinstance(value, Mapping):  # a cell of a hub data set
        cell = cast(Mapping[str, Any], value)
        if cell.get("bytes") is None and not cell.get("path"):
            raise ValueError(f"{where}: {key} is empty.")
        return Encoded(where, Path(cell["path"] or ""), cell["bytes"])
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {key} is {'empty' if value in ('', None) else repr(value)[:40]}; expected a text.")
    if key == "text":
        return value
    path = folder / value
    if not path.is_file():
        raise ValueError(f"{where}: there is no file {path}; paths count from the table's folder.")
    return Encoded(str(path), path)


def _numbers(
    labels: Sequence[str | int], given: Sequence[str], where: Sequence[str]
) -> tuple[tuple[str, ...], list[int]]:
    """The names of the classes, and the number of each item's."""
    if not given:
        kinds = {type(label) for label in labels}
        if len(kinds) > 1:
            raise ValueError(
                f"{where[0]}: labels are numbers in some rows and texts in others; write one or the other."
            )
        names = [str(label) for label in sorted(set(labels))]  # pyright: ignore[reportArgumentType]  (of one kind)
        places = {name: number for number, name in enumerate(names)}
        return tuple(names), [places[str(label)] for label in labels]
    places = {name: number for number, name in enumerate(given)}
    numbers = [places.get(label, -1) if isinstance(label, str) else label for label in labels]
    for number, label, line in zip(numbers, labels, where, strict=True):
        if not 0 <= number < len(given):
            raise ValueError(f"{line}: label {label!r} is not one of the {len(given)} classes ({given[0]}, ...).")
    return tuple(given), numbers


def _groups(numbers: Sequence[int], groups: Sequence[str | None], names: Sequence[str], source: str) -> tuple[str, ...]:
    """The group of each class, where rows say it."""
    of_class: dict[int, str | None] = {}
    for number, group in zip(numbers, groups, strict=True):
        if of_class.setdefault(number, group) != group:
            raise ValueError(
                f"{source}: class {names[number]!r} is of group {of_class[number]!r} in one row and of {group!r} in "
                "another; a class is of one group."
            )
    return tuple(of_class.get(number) or "" for number in range(len(names))) if any(of_class.values()) else ()


def _separated(path: Path) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise ValueError(f"{where}: a row of other length than the first line; quote commas within a cell.")
                yield where, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a table in UTF-8 ({error}).") from error
