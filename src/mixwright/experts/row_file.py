"""A table of neurons in one file, made to be read a few rows at a time.

The first page or pages are the header: eight bytes of magic, the length of a JSON text, its SHA-256, and the text. It
says how many experts there are, what one consists of (rows and biases: the fields of a record), how far apart the
records stand, and the SHA-256 of everything after the header. Records follow in the order of ids. A record smaller
than a page takes the next power of two, so that none lies across a page's edge; a larger one takes whole pages. All
parts of a neuron are in one record: at width 1024 in bfloat16, two parts are one page and one read.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixwright.errors import CatalogError
from mixwright.files import open_regular, read_exactly, staged_file, write_all

MAGIC = b"mwrows\x00\x01"
FORMAT = 1
PAGE = 4096
_HEADER_LIMIT = 1 << 16
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8)
}
Records = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Field:
    """One tensor of every expert: its rows, its biases, its scales."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Of one expert."""
        return _DTYPES[self.dtype].itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True, slots=True)
class RowFormat:
    """What the records of a file are."""

    num_experts: int
    fields: tuple[Field, ...]

    @property
    def record(self) -> int:
        """Bytes of one expert."""
        return sum(field.bytes for field in self.fields)

    @property
    def stride(self) -> int:
        """Bytes from one expert to the next."""
        if self.record >= PAGE:
            return -(-self.record // PAGE) * PAGE
        return 1 << (self.record - 1).bit_length()

    def tensors(self, records: Records) -> dict[str, Tensor]:
        """The fields of some records, each with the records' axis first."""
        found: dict[str, Tensor] = {}
        start = 0
        for field in self.fields:
            part = torch.from_numpy(np.ascontiguousarray(records[:, start : start + field.bytes]))
            found[field.name] = part.view(_DTYPES[field.dtype]).view(len(records), *field.shape)
            start += field.bytes
        return found

    def records(self, tensors: Mapping[str, Tensor]) -> Records:
        """The other way round, each record as long as the stride."""
        count = len(tensors[self.fields[0].name])
        records = np.zeros((count, self.stride), np.uint8)
        start = 0
        for field in self.fields:
            flat = tensors[field.name].detach().cpu().contiguous().view(count, -1)
            records[:, start : start + field.bytes] = flat.view(torch.uint8).numpy()
            start += field.bytes
        return records


def row_format(num_experts: int, tensors: Mapping[str, Tensor]) -> RowFormat:
    """The format of a table whose experts have these tensors, each with the experts' axis first."""
    return RowFormat(
        num_experts,
        tuple(
            Field(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape[1:]))
            for name, tensor in tensors.items()
        ),
    )


def write_row_file(path: str | os.PathLike[str], form: RowFormat, blocks: Iterable[Mapping[str, Tensor]]) -> None:
    """Write a table, whole or not at all; `blocks` bring its experts in order, some at a time.

    A file of that name is replaced at one instant; whoever reads the old one goes on reading it. Raises CatalogError
    (DISK_FULL).
    """
    digest = hashlib.sha256()
    offset = len(header(form, "0" * 64))
    written = 0
    with staged_file(path, offset + form.num_experts * form.stride) as descriptor:
        os.lseek(descriptor, offset, os.SEEK_SET)
        for block in blocks:
            records = form.records(block)
            digest.update(records.data)
            write_all(descriptor, records.data)
            written += len(records)
        assert written == form.num_experts, f"{written} of {form.num_experts} experts came"
        os.lseek(descriptor, 0, os.SEEK_SET)
        write_all(descriptor, header(form, digest.hexdigest()))


def header(form: RowFormat, sha256: str) -> bytes:
    """The pages before the records; `sha256` of the records."""
    content = {"format": FORMAT, **asdict(form), "stride": form.stride, "sha256": sha256}
    text = json.dumps(content, separators=(",", ":")).encode()
    data = MAGIC + len(text).to_bytes(8, "little") + hashlib.sha256(text).digest() + text
    return data.ljust(-(-len(data) // PAGE) * PAGE, b"\x00")


def open_row_file(path: str | os.PathLike[str]) -> tuple[int, RowFormat, int, str]:
    """A descriptor, what the records are, where they begin, and their SHA-256. Only the header is read.

    Raises CatalogError: PATH, HEADER, VERSION, SIZE.
    """
    name = Path(path).name
    try:
        descriptor = open_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        raise CatalogError("PATH", name, "there is no such file; expected one that to_disk wrote.") from None
    try:
        form, offset, sha256 = _read_header(descriptor, name)
        size, wanted = os.fstat(descriptor).st_size, offset + form.num_experts * form.stride
        if size != wanted:
            raise CatalogError(
                "SIZE",
                name,
                f"{size} bytes, and its header promises {wanted} ({form.num_experts} experts, {form.stride} bytes "
                "apart). It was cut off or is another file; copy it again.",
            )
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, form, offset, sha256


def _read_header(descriptor: int, name: str) -> tuple[RowFormat, int, str]:
    start = read_exactly(descriptor, 48)
    if len(start) < 48 or start[:6] != MAGIC[:6]:
        raise CatalogError("HEADER", name, "it is no table of rows; expected a file that to_disk wrote.")
    if start[:8] != MAGIC:
        raise CatalogError("VERSION", name, f"layout {start[7]}; this mixwright reads {MAGIC[7]}.")
    length = int.from_bytes(start[8:16], "little")
    text = read_exactly(descriptor, length) if length <= _HEADER_LIMIT else b""
    if len(text) != length or hashlib.sha256(text).digest() != start[16:48]:
        raise CatalogError("HEADER", name, f"its header of {length} bytes is damaged; copy the file again.")
    try:
        form, sha256 = _decode(json.loads(text))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CatalogError("HEADER", name, f"its header cannot be read ({str(error)[:120]}).") from None
    return form, -(-(48 + length) // PAGE) * PAGE, sha256


def _decode(raw: Any) -> tuple[RowFormat, str]:
    if not isinstance(raw, dict) or set(raw) != {"format", "num_experts", "fields", "stride", "sha256"}:
        raise ValueError("other keys than expected")
    fields = tuple(Field(f["name"], f["dtype"], _sizes(f["shape"])) for f in raw["fields"])
    if any(f.dtype not in _DTYPES for f in fields) or len({f.name for f in fields}) != len(fields) or not fields:
        raise ValueError(f"fields {[f.name for f in fields]} of types {[f.dtype for f in fields]}")
    form = RowFormat(_sizes([raw["num_experts"]])[0], fields)
    if raw["format"] != FORMAT or raw["stride"] != form.stride:
        raise ValueError(f"format {raw['format']}, stride {raw['stride']}; expected {FORMAT}, {form.stride}")
    return form, str(raw["sha256"])


def _sizes(raw: Sequence[Any]) -> tuple[int, ...]:
    if not all(type(size) is int and 0 < size < 1 << 48 for size in raw):
        raise ValueError(f"sizes {raw}")
    return tuple(raw)
