"""JSON from outside, read strictly: bounded in size and depth, no name twice, nothing but what JSON has."""

import json
import re
from typing import Any, TypeGuard

from mixwright.catalog.refusal import quote, refuse

MAX_DEPTH = 16

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)  # each character is looked at once
_BRACKETS = bytes(b for b in range(256) if b not in b"[]{}")


def parse(data: bytes, where: str, *, code: str = "JSON", nan: bool = False) -> dict[str, Any]:
    """The object that a JSON text holds.

    Raises CatalogError: `code` for what is no JSON object in UTF-8 or is nested deeper than 16, DUP for a name that
    stands twice in one object. NaN and infinity are let through where `nan` is set, for a schema that names them.
    """
    if _depth(data) > MAX_DEPTH:
        raise refuse(
            code, where, f"it is nested deeper than {MAX_DEPTH} levels. Save it again with the tool that made it."
        )

    def constant(text: str) -> float:
        if nan:
            return float(text)
        raise ValueError(f"{text} is not JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise refuse("DUP", where, f"the name {quote(name)} stands twice; each may stand once. Remove one.")
            found[name] = value
        return found

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        text = "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise refuse(
            code, where, f"it is not JSON ({quote(text)}). Save it again with the tool that made it."
        ) from None
    if not is_object(value):
        raise refuse(code, where, "it holds no JSON object; one in braces is expected.")
    return value


def render(value: dict[str, Any]) -> bytes:
    """The one way this house writes JSON: sorted, indented, UTF-8, a line end at the end. NaN is refused."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def is_object(value: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a value that JSON gave is an object."""
    return isinstance(value, dict)


def is_list(value: Any) -> TypeGuard[list[Any]]:
    """Whether a value that JSON gave is a list."""
    return isinstance(value, list)


def _depth(data: bytes) -> int:
    deepest = depth = 0
    for bracket in _STRING.sub(b"", data).translate(None, _BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
        if deepest > MAX_DEPTH:
            break
    return deepest
