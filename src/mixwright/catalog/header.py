"""The header of a safetensors file, read before anything is allocated, against a strict schema of our own.

The library's reader accepts two tensors of one name and any size of header; this one says what each byte of a file is.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from mixwright.catalog.document import is_list, is_object, parse
from mixwright.catalog.refusal import Faults, quote, refuse, show

MAX_HEADER = 2 * 1024 * 1024
MAX_RANK_OF_TENSOR = 8
MAX_NAME = 512
WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}
_OTHER = {
    "F64",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F4",
    "I64",
    "I32",
    "I16",
    "I8",
    "U64",
    "U32",
    "U16",
    "U8",
    "BOOL",
    "C64",
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as the header declares it; `start` and `end` are offsets into the data after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a file holds: its tensors by name, and where their data begins."""

    tensors: Mapping[str, TensorEntry]
    data_start: int


def header_length(first_bytes: bytes, file_size: int, where: str) -> int:
    """How long the header is, from the file's first 8 bytes. Raises CatalogError (HEADER) for an impossible length."""
    if len(first_bytes) < 8:
        raise refuse("HEADER", where, f"{file_size} bytes is too short for a safetensors file. Copy or save it again.")
    length = int.from_bytes(first_bytes[:8], "little")
    if length > MAX_HEADER:
        raise refuse("HEADER", where, f"its header claims {length} bytes; at most {MAX_HEADER} are accepted.")
    if length < 2 or 8 + length > file_size:
        message = (
            f"its header claims {length} bytes of a file of {file_size}. The file is cut off or no safetensors file."
        )
        raise refuse("HEADER", where, message)
    return length


def read_header(data: bytes, file_size: int, where: str) -> Header:
    """The header from its JSON bytes.

    Raises CatalogError: HEADER for a layout that does not cover the file exactly, DUP for a name twice, DTYPE for
    anything but F32, F16 and BF16.
    """
    if not data.startswith(b"{"):
        raise refuse("HEADER", where, "its header does not begin with a brace. It is no safetensors file.")
    raw = parse(data, where, code="HEADER")
    faults = Faults(where)
    _check_metadata(raw.pop("__metadata__", {}), faults)
    entries = [entry for name, value in raw.items() if (entry := _entry(name, value, faults)) is not None]
    faults.check()
    _check_cover(entries, file_size - 8 - len(data), faults)
    faults.check()
    return Header({entry.name: entry for entry in entries}, 8 + len(data))


def _check_metadata(metadata: Any, faults: Faults) -> None:
    if not is_object(metadata) or not all(isinstance(value, str) for value in metadata.values()):
        faults.add("HEADER", "__metadata__ must map names to text. Save the file again with safetensors.")


def _entry(name: str, value: Any, faults: Faults) -> TensorEntry | None:
    if len(name) > MAX_NAME:
        faults.add("HEADER", f"a tensor's name has {len(name)} characters; at most {MAX_NAME} are accepted.")
        return None
    if not is_object(value) or set(value) != {"dtype", "shape", "data_offsets"}:
        faults.add("HEADER", f"{quote(name)} must have exactly dtype, shape and data_offsets. Save the file again.")
        return None
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in WIDTHS:
        faults.add(*_dtype_fault(name, dtype))
        return None
    if not (_counts(shape) and len(shape) <= MAX_RANK_OF_TENSOR):
        faults.add("HEADER", f"{quote(name)} has a shape that is no list of at most {MAX_RANK_OF_TENSOR} sizes.")
        return None
    if not (_counts(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        faults.add("HEADER", f"{quote(name)} has data_offsets that are not [begin, end].")
        return None
    needed = math.prod(shape) * WIDTHS[dtype]
    if offsets[1] - offsets[0] != needed:
        taken = show(offsets[1] - offsets[0])
        faults.add("HEADER", f"{quote(name)} spans {taken} bytes where its shape and dtype need {show(needed)}.")
        return None
    return TensorEntry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _dtype_fault(name: str, dtype: Any) -> tuple[str, str]:
    if isinstance(dtype, str) and dtype in _OTHER:
        advice = "Convert it: load_file, tensor.to(torch.float32), save_file (safetensors.torch)."
        return "DTYPE", f"{quote(name)} is {dtype}; F32, F16 and BF16 are accepted. {advice}"
    return "DTYPE", f"{quote(name)} has the unknown dtype {quote(dtype)}; F32, F16 and BF16 are accepted."


def _counts(value: Any) -> TypeGuard[list[int]]:
    return is_list(value) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_cover(entries: list[TensorEntry], size: int, faults: Faults) -> None:
    position = 0
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.end)):
        if entry.start != position:
            what = "overlaps the tensor before it" if entry.start < position else "leaves a hole before it"
            return faults.add("HEADER", f"{quote(entry.name)} {what} (byte {entry.start}, not {position}).")
        position = entry.end
    if position != size:
        what = "cut off" if position > size else "followed by bytes that belong to no tensor"
        faults.add("HEADER", f"the data is {what}: {position} bytes are declared, {size} are there. Copy it again.")
    return None
