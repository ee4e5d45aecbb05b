"""Tables larger than memory: neurons that stay in a file and are read as they are retrieved."""

import os
from collections.abc import Iterator

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from mixwright.errors import CatalogError
from mixwright.experts.fetched import AbstractFetchedTable, Brought
from mixwright.experts.row_file import Field, row_format, write_row_file
from mixwright.experts.row_reader import AbstractReader, CachedReader, MappedReader, RowReader
from mixwright.experts.table import AbstractTable

_BLOCK = 1 << 26  # bytes written at a time


class DiskTable(AbstractFetchedTable):
    """A `NeuronTable` that lies in a file; inference only, equal to the bit to the table in memory.

    Rows are read once for each call that retrieves them, by way of a cache of `cache_bytes`, the longest unused leaving
    first. With `mapped` the file is mapped into memory instead and the system's page cache is the only one. `reader`
    counts what is read. Its state dict is empty: the file is the state.
    """

    def __init__(self, path: str | os.PathLike[str], cache_bytes: int = 1 << 26, *, mapped: bool = False) -> None:
        super().__init__()
        self.reader: AbstractReader = (MappedReader if mapped else RowReader)(path)
        form = self.reader.form
        self.num_experts = form.num_experts
        self.parts, self.width = _shape(form.fields, os.path.basename(self.reader.path))
        self.cache = CachedReader(self.reader, 0 if mapped else min(cache_bytes // form.record, form.num_experts))

    def fetch(self, ids: Int[Tensor, " ids"]) -> Brought:
        """Rows and biases of ids that are distinct and ascending."""
        if len(ids) and not 0 <= int(ids[0]) <= int(ids[-1]) < self.num_experts:
            raise IndexError(f"ids {int(ids[0])} to {int(ids[-1])} of a table of {self.num_experts} experts.")
        found = self.reader.form.tensors(self.cache.read(ids.cpu().numpy()))
        bias = found.get("bias")
        return Brought(found["rows"].to(ids.device), None if bias is None else bias.to(ids.device))

    def pin(self, ids: Int[Tensor, " ids"]) -> None:
        """Keep these experts in memory for good, and no others: those used most, say `usage.topk(4096).indices`."""
        self.cache.pin(ids.cpu().numpy())

    def verify(self) -> None:
        """Read the whole file once and check it against its SHA-256. Raises CatalogError (HASH)."""
        self.reader.verify()

    def extra_repr(self) -> str:
        """File and shape."""
        return f"{os.path.basename(self.reader.path)!r}, {self.num_experts} experts, {self.parts} x {self.width}"


def write_table(table: AbstractTable, path: str | os.PathLike[str]) -> None:
    """Write a table to a file that `DiskTable` reads: whole or not at all, a file of that name replaced at one instant.

    Raises CatalogError (DISK_FULL).
    """
    rows, bias = table.take(torch.arange(1))
    form = row_format(table.num_experts, {"rows": rows} if bias is None else {"rows": rows, "bias": bias})
    write_row_file(path, form, _blocks(table, max(1, _BLOCK // form.stride)))


def to_disk(table: AbstractTable, path: str | os.PathLike[str], cache_bytes: int = 1 << 26) -> DiskTable:
    """Write a table and return the one that reads the file."""
    write_table(table, path)
    return DiskTable(path, cache_bytes)


def name_of(table: DiskTable) -> UInt8[Tensor, " bytes"]:
    """Where a table's file is, and its SHA-256, for what can keep nothing but tensors."""
    return torch.tensor(list(f"{table.reader.sha256} {table.reader.path}".encode()), dtype=torch.uint8)


def by_name(name: UInt8[Tensor, " bytes"], cache_bytes: int = 1 << 26) -> DiskTable:
    """The table of that file. Raises CatalogError: PATH, HASH, and what else `DiskTable` raises."""
    sha256, _, path = bytes(name.tolist()).decode(errors="replace").partition(" ")
    table = DiskTable(path, cache_bytes)
    if table.reader.sha256 != sha256:
        raise CatalogError(
            "HASH",
            os.path.basename(path),
            f"it holds other rows ({table.reader.sha256[:12]}) than those that were named ({sha256[:12]}); put that "
            "table in its place.",
        )
    return table


def _blocks(table: AbstractTable, step: int) -> Iterator[dict[str, Tensor]]:
    for start in range(0, table.num_experts, step):
        ids = torch.arange(start, min(start + step, table.num_experts))
        rows, bias = table.take(ids)
        yield {"rows": rows} if bias is None else {"rows": rows, "bias": bias}


def _shape(fields: tuple[Field, ...], name: str) -> tuple[int, int]:
    kinds = {field.name: field for field in fields}
    rows, bias = kinds.get("rows"), kinds.get("bias")
    if (
        rows is None
        or len(rows.shape) != 2
        or not 1 <= rows.shape[0] <= 3
        or rows.dtype == "int8"
        or set(kinds) - {"rows", "bias"}
        or (bias is not None and bias.shape != (rows.shape[0] - 1,))
    ):
        found = ", ".join(f"{field.name} {field.dtype} {list(field.shape)}" for field in fields)
        raise CatalogError(
            "SHAPE", name, f"its records are {found}; expected rows [1 to 3, width] and perhaps bias [parts - 1]."
        )
    return rows.shape[0], rows.shape[1]
