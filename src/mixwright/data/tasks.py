"""Tasks from files: rows are read strictly, and a bad one is named by file and line."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from mixwright.errors import MissingExtra

Format = Literal["prompt", "text", "label"]
Row = tuple[str, Mapping[str, Any]]
KEYS: Mapping[Format, tuple[str, ...]] = {
    "prompt": ("prompt", "completion"),
    "label": ("text", "label"),
    "text": ("text",),
}
SPLIT_FILES: Mapping[str, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "dev"),
    "test": ("test",),
}


@dataclass(frozen=True, slots=True)
class Example:
    """One row: a text, and the text (`target`) or the number of the label (`label`) that is wanted for it.

    `where` is its file and line, for messages.
    """

    text: str
    target: str | None = None
    label: int | None = None
    where: str = ""


@dataclass(frozen=True, slots=True)
class TextTask:
    """Examples of one format; `labels` are the label texts in the order of their numbers, empty for other formats."""

    name: str
    format: Format
    examples: tuple[Example, ...]
    labels: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.examples)


def read_task(
    source: str | Path | Sequence[str | Path],
    *,
    format: Format | Literal["auto"] = "auto",
    split: Literal["train", "validation", "test"] = "train",
    labels: Sequence[str] | None = None,
    limit: int | None = None,
) -> TextTask:
    """The examples of a `.jsonl` or `.txt` file, a folder of splits, several of these, or a hub data set.

    A `.txt` file is one document of plain text. A folder holds `<split>.jsonl`, or `<split>.txt`, and may hold
    `task.json` with `labels`, the label texts in order. What is no path on this machine is taken for a hub id,
    `owner/name` with an optional `:configuration` and `#split`; of its plain text, blank rows are left out. Labels in
    rows are numbers, or texts out of `labels`; without `labels` anywhere, the texts that occur, sorted.

    Raises:
        ValueError: a file is missing or empty, or a row is not what its format says; names file and line.
        MissingExtra: a hub data set without the extra `data`.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    if not sources:
        raise ValueError(f"data.{split}: an empty list of files; name at least one.")
    names: tuple[str, ...] = tuple(labels or ())
    rows: list[Row] = []
    for item in sources:
        found, own_labels = _rows(str(item), split)
        names = names or own_labels
        rows.extend(_take(found, None if limit is None else limit - len(rows)))
    if not rows:
        raise ValueError(f"{', '.join(map(str, sources))}: no examples; every line is blank or there are none.")
    return _task(Path(str(sources[0]).split("#")[0]).stem, rows, format, names)


def task_of(
    rows: Sequence[Mapping[str, Any]],
    *,
    name: str,
    format: Format | Literal["auto"] = "auto",
    labels: Sequence[str] | None = None,
) -> TextTask:
    """The same of rows in memory, such as `{"text": ..., "label": ...}`. Raises ValueError, naming the row."""
    if not rows:
        raise ValueError(f"{name}: no examples; give at least one row.")
    strange = next((row for row in rows if not isinstance(row, Mapping)), None)  # pyright: ignore  (a caller's rows)
    if strange is not None:
        raise ValueError(
            f"{name}[{list(rows).index(strange)}]: a {type(strange).__name__}; expected rows with keys: prompt and "
            "completion, text and label, or text."
        )
    return _task(name, [(f"{name}[{number}]", row) for number, row in enumerate(rows)], format, tuple(labels or ()))


def _task(name: str, rows: Sequence[Row], format: Format | Literal["auto"], names: tuple[str, ...]) -> TextTask:
    kind = _format_of(rows[0]) if format == "auto" else format
    examples = [_example(row, kind) for row in rows]
    task = TextTask(name, kind, tuple(example for example, _ in examples))
    return _with_labels(task, [label for _, label in examples], names) if kind == "label" else task


def _rows(source: str, split: str) -> tuple[Iterable[Row], tuple[str, ...]]:
    path = Path(source)
    if path.is_dir():
        return _file(_split_file(path, split)), folder_labels(path)
    if path.is_file():
        return _file(path), ()
    if (
        path.suffix in {".jsonl", ".json", ".txt"}
        or path.is_absolute()
        or source.startswith(".")
        or source.count("/") > 1
    ):
        raise ValueError(
            f"{source}: no such file; give a .jsonl or .txt file, a folder with {split}.jsonl, or a hub id."
        )
    return _hub(source, split)


def _file(path: Path) -> Iterable[Row]:
    return [(str(path), {"text": path.read_text(encoding="utf-8")})] if path.suffix == ".txt" else json_lines(path)


def _split_file(folder: Path, split: str) -> Path:
    names = [f"{name}{suffix}" for suffix in (".jsonl", ".txt") for name in SPLIT_FILES[split]]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    there = ", ".join(sorted(p.name for p in folder.iterdir() if p.suffix in (".jsonl", ".txt")))
    raise ValueError(f"{folder}: no {names[0]}; the folder holds {there or 'no .jsonl file'}. Name the file itself.")


def folder_labels(folder: Path) -> tuple[str, ...]:
    """The label texts that a folder's `task.json` gives, in order; none without. Raises ValueError for a faulty one."""
    card = folder / "task.json"
    if not card.is_file():
        return ()
    try:
        labels = json.loads(card.read_text(encoding="utf-8")).get("labels", [])
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{card}: not a JSON object ({error}).") from None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{card}: labels must be a list of texts.")
    return tuple(labels)


def json_lines(path: Path) -> Iterator[Row]:
    """Each line of a JSONL file, with its file and line. Raises ValueError for one that is no JSON object."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{where}: not a line of JSON ({error}).") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where}: expected an object with keys, got {type(row).__name__}.")
            yield where, row


def open_hub(source: str, split: str) -> Any:
    """A split of a hub data set, `owner/name` with an optional `:configuration` and `#split`, as `datasets` gives it.

    Raises MissingExtra without the extra `data`.
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise MissingExtra("data", f"{source!r} is no file here; reading it as a hub data set") from None
    whole, _, part = source.partition("#")
    name, _, configuration = whole.partition(":")
    chosen = [configuration] if configuration else []
    return cast(Any, datasets).load_dataset(name, *chosen, split=part or split)


def _hub(source: str, split: str) -> tuple[Iterable[Row], tuple[str, ...]]:
    table = open_hub(source, split)
    names = getattr(table.features.get("label"), "names", None) or ()
    plain = "text" in table.features and "label" not in table.features
    rows = ((f"{source}:{number}", row) for number, row in enumerate(table))
    return ((where, row) for where, row in rows if not plain or row["text"].strip()), tuple(names)


def _take(rows: Iterable[Row], limit: int | None) -> Iterator[Row]:
    for number, row in enumerate(rows):
        if limit is not None and number >= limit:
            return
        yield row


def _format_of(row: Row) -> Format:
    where, values = row
    for kind, keys in KEYS.items():
        if all(key in values for key in keys):
            return kind
    raise ValueError(
        f"{where}: keys {', '.join(sorted(values)) or 'none'}; expected prompt and completion, text and label, or text."
    )


def _example(row: Row, kind: Format) -> tuple[Example, int | str | None]:
    where, values = row
    missing = [key for key in KEYS[kind] if key not in values]
    if missing:
        raise ValueError(f"{where}: no {missing[0]!r}; a row of format {kind!r} has {' and '.join(KEYS[kind])}.")
    if kind == "prompt":
        return Example(_string(values, "prompt", where), _string(values, "completion", where), where=where), None
    text = Example(_string(values, "text", where), where=where)
    return text, (values["label"] if kind == "label" else None)


def _string(values: Mapping[str, Any], key: str, where: str) -> str:
    value = values[key]
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key} is {type(value).__name__}, expected a text.")
    if not value.strip() and key != "prompt":
        raise ValueError(f"{where}: {key} is empty.")
    return value


def _with_labels(task: TextTask, given: Sequence[int | str | None], names: tuple[str, ...]) -> TextTask:
    """Label texts and numbers become numbers; without a known set, the texts that occur, sorted."""
    if not names:
        texts = {label for label in given if isinstance(label, str)}
        if len(texts) < 1 or not all(isinstance(label, str) for label in given):
            first = task.examples[0].where
            raise ValueError(f"{first}: labels are numbers, and nothing names them; give data.labels or a task.json.")
        names = tuple(sorted(texts))
    if len(set(names)) < len(names) or len(names) < 2:
        raise ValueError(
            f"{task.name}: {len(names)} labels, {len(set(names))} of them different; expected two or more."
        )
    numbers = [_label_number(label, names, example.where) for label, example in zip(given, task.examples, strict=True)]
    examples = tuple(replace(example, label=n) for example, n in zip(task.examples, numbers, strict=True))
    return replace(task, examples=examples, labels=names)


def _label_number(label: int | str | None, names: tuple[str, ...], where: str) -> int:
    if isinstance(label, str) and label in names:
        return names.index(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(names):
        return label
    shown = ", ".join(map(repr, names[:8])) + (", ..." if len(names) > 8 else "")
    raise ValueError(f"{where}: label {label!r} is outside the set; expected 0 to {len(names) - 1}, or one of {shown}.")
