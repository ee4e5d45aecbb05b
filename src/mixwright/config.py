"""Frozen dataclasses from files and back, strictly: an unknown key is refused and the nearest known one named.

pydantic checks the values and is imported when something is decoded, not before. A dataclass with a class variable
`SHORTHAND = "field"` may be written as the bare value of that field.
"""

import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from mixwright.yaml12 import parse_yaml

T = TypeVar("T")

MAX_BYTES = 1_000_000


def decode(cls: type[T], mapping: Mapping[str, Any], where: str = "recipe") -> T:
    """An instance of the dataclass `cls` from plain data.

    Raises:
        ValueError: one line per fault, each with its dotted key: unknown (the nearest known key is suggested), missing,
            or of the wrong type or range. `where` stands before every key.
    """
    from pydantic import TypeAdapter, ValidationError

    if not isinstance(mapping, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]  a border: files hold anything
        raise ValueError(f"{where}: expected keys and values, got {_show(mapping)}")
    faults: list[str] = []
    data = _written_out(cls, mapping, where, faults)
    if faults:
        raise ValueError("\n".join(faults))
    try:
        # Through JSON, where strict mode takes a list for a tuple but still no string for a number.
        return TypeAdapter(cls).validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        lines = [_fault(item["loc"], item["msg"], item["input"], where, data) for item in error.errors()]
        raise ValueError("\n".join(dict.fromkeys(lines))) from None
    except (TypeError, RecursionError) as error:
        raise ValueError(f"{where}: only plain data is decoded: {error}") from None


def encode(value: object) -> dict[str, Any]:
    """Plain data, ready for JSON or YAML, of a dataclass instance; `decode` reads it back to an equal value."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        raise TypeError(f"encode takes an instance of a dataclass, got {type(value).__name__}")
    return cast(dict[str, Any], _plain(dataclasses.asdict(value)))


def override(mapping: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """A copy of `mapping` with dotted settings such as `config.top_k=2` written over it; values are read as YAML."""
    result = cast(dict[str, Any], _plain(mapping))
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not all(key.split(".")):
            raise ValueError(f"setting {setting!r}: expected KEY=VALUE with a dotted key, for example config.top_k=2")
        *parents, last = key.split(".")
        node = result
        for depth, parent in enumerate(parents):
            if node.get(parent) is None:
                node[parent] = {}
            child = node[parent]
            if not isinstance(child, dict):
                at = ".".join(parents[: depth + 1])
                raise ValueError(f"setting {setting!r}: {at} is the value {_show(child)} and has no parts to set")
            node = cast(dict[str, Any], child)
        node[last] = parse_yaml(text, f"setting {setting!r}")
    return result


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ValueError: the file is missing, larger than `MAX_BYTES`, not YAML, or not a mapping at the top.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size} bytes; at most {MAX_BYTES} are read as YAML")
    try:
        value = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected keys and values at the top, got {_show(value)}")
    return cast(dict[str, Any], value)


def schema(cls: type) -> dict[str, Any]:
    """JSON schema of a dataclass; the docstring under each field becomes its description."""
    from pydantic import TypeAdapter

    result = TypeAdapter(cls).json_schema()
    for described in _dataclasses_under(cls):
        home = result if described is cls else result.get("$defs", {}).get(described.__name__, {})
        home["additionalProperties"] = False
        for name, text in _field_docs(described).items():
            if name in home.get("properties", {}):
                home["properties"][name]["description"] = text
    return result


def _written_out(hint: Any, value: Any, where: str, faults: list[str]) -> Any:
    """`value` with each shorthand written as the mapping it stands for; unknown keys are added to `faults`."""
    cls = _dataclass_in(hint)
    if isinstance(value, (list, tuple)):
        items = cast(Sequence[Any], value)
        return [_written_out(_element(hint), item, f"{where}[{i}]", faults) for i, item in enumerate(items)]
    if cls is not None and isinstance(value, str) and hasattr(cls, "SHORTHAND"):
        return {cls.SHORTHAND: value}
    if not isinstance(value, Mapping):
        return value
    mapping = cast(Mapping[str, Any], value)
    if cls is None:
        return {key: _written_out(_element(hint), item, f"{where}.{key}", faults) for key, item in mapping.items()}
    hints = _field_types(cls)
    faults.extend(_unknown(key, tuple(hints), where) for key in mapping if key not in hints)
    return {key: _written_out(hints.get(key), item, f"{where}.{key}", faults) for key, item in mapping.items()}


def _unknown(key: str, known: Sequence[str], where: str) -> str:
    near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
    advice = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known) or 'no keys'}"
    return f"{where}.{key}: unknown key; {advice}"


def _fault(loc: tuple[int | str, ...], message: str, came: Any, where: str, data: Any) -> str:
    for part in loc:
        # pydantic names the branches of a union among the keys; only what leads through the data is a key.
        if isinstance(data, dict) and part in data:
            where, data = f"{where}.{part}", cast(dict[str, Any], data)[cast(str, part)]
        elif isinstance(data, list) and isinstance(part, int):
            where, data = f"{where}[{part}]", cast(list[Any], data)[part]
        elif message == "Field required" and part == loc[-1]:
            return f"{where}.{part}: missing"
    if message.startswith("Value error, "):
        return f"{where}: {message.removeprefix('Value error, ')}"
    return f"{where}: {message.replace('Input should be', 'expected')}, got {_show(came)}"


def _dataclass_in(hint: Any) -> Any:
    """The dataclass that `hint` is or offers as one member of a union; None without one."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint
    if get_origin(hint) in (Annotated, Union, UnionType):
        return next((found for part in get_args(hint) if (found := _dataclass_in(part)) is not None), None)
    return None


def _element(hint: Any) -> Any:
    """The type inside a tuple, list or mapping, looked for through unions; None where there is none."""
    if get_origin(hint) in (Annotated, Union, UnionType):
        return next((found for part in get_args(hint) if (found := _element(part)) is not None), None)
    if get_origin(hint) is None:
        return None
    parts = [part for part in get_args(hint) if part is not Ellipsis]
    return parts[-1] if parts else None


def _field_types(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _dataclasses_under(cls: Any) -> Iterator[Any]:
    yield cls
    for hint in _field_types(cls).values():
        inner = _dataclass_in(hint) or _dataclass_in(_element(hint))
        if inner is not None:
            yield from _dataclasses_under(inner)


def _field_docs(cls: Any) -> dict[str, str]:
    """The string that stands under each field in the source of `cls`; empty where the source is not at hand."""
    try:
        body = cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]).body
    except (OSError, TypeError):
        return {}
    docs: dict[str, str] = {}
    for field, below in itertools.pairwise(body):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str() as text)):
                docs[name] = " ".join(text.split())
            case _:
                pass
    return docs


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in cast(Sequence[Any], value)]
    return value


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
