"""A model's tables in a folder, a file for each process: written side by side, read by any number of processes.

`tables.json` says which experts and columns of which table lie in which file, and the SHA-256 of each. Whoever loads
reads the slices that it holds and no others; only to check the files, each process reads its share of them whole. All
processes must see the folder. What is not in a table belongs to the model's own files.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mixwright.errors import CatalogError
from mixwright.experts.sharded_table import AbstractShardedTable, Piece
from mixwright.experts.table import AbstractTable, NeuronTable
from mixwright.files import read_regular, sha256_file, staged_folder, write_new
from mixwright.ops.exchange import exchange

FORMAT = 1
INDEX = "tables.json"
_INDEX_LIMIT = 1 << 24


class _Processes:
    """Those that write or read together: a group, or this one alone."""

    def __init__(self, tables: Mapping[str, AbstractTable]) -> None:
        sharded = [table for table in tables.values() if isinstance(table, AbstractShardedTable)]
        self.alone, self.group = not sharded, sharded[0].group if sharded else None
        self.device = _local(sharded[0]).rows.device if sharded else torch.device("cpu")
        self.rank, self.count = (0, 1) if self.alone else (dist.get_rank(self.group), dist.get_world_size(self.group))

    def tell(self, text: str) -> list[str]:
        """Everybody's text, by rank."""
        if self.alone:
            return [text]
        data, ones = text.encode(), [1] * self.count
        lengths = exchange(torch.tensor([len(data)] * self.count, device=self.device), ones, ones, self.group).tolist()
        sent = torch.tensor(list(data) * self.count, dtype=torch.uint8, device=self.device)
        got = exchange(sent, [len(data)] * self.count, lengths, self.group)
        return [bytes(part.tolist()).decode() for part in got.split(lengths)]

    def agree(self, failure: BaseException | None, what: str) -> None:
        """Raise here if it failed anywhere, so that nobody waits for a process that has given up."""
        said = self.tell("" if failure is None else f"{type(failure).__name__}: {str(failure)[:300]}")
        if failure is not None:
            raise failure
        for rank, text in enumerate(said):
            if text:
                raise CatalogError("INCOMPLETE", what, f"process {rank} failed: {text}. Nothing was changed.")


def save_tables(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the tables of `model`, each process what it holds; the folder appears whole or not at all.

    Raises CatalogError (PATH) for a folder in use, (DISK_FULL), (INCOMPLETE) where another process failed.
    """
    tables, final = _tables(model), Path(folder)
    processes, failure = _Processes(tables), None
    try:
        with contextlib.ExitStack() as stack:
            _write_together(tables, final, processes, stack)
    except Exception as error:
        failure = error
    processes.agree(failure, final.name)


def _write_together(
    tables: Mapping[str, AbstractTable], final: Path, processes: "_Processes", stack: contextlib.ExitStack
) -> None:
    """Ends on all processes in the same way: they agree after each thing that can fail."""
    failure, staging, digest = None, "", ""
    try:
        if processes.rank == 0:
            staging = str(stack.enter_context(staged_folder(final)))
    except (CatalogError, OSError) as error:
        failure = error
    processes.agree(failure, final.name)
    target = Path(processes.tell(staging)[0])
    try:
        digest = _write_own(tables, target / _name(processes.rank, processes.count))
    except Exception as error:
        failure = error
    processes.agree(failure, final.name)
    digests = processes.tell(digest)
    if processes.rank == 0:
        files = {_name(rank, processes.count): sha256 for rank, sha256 in enumerate(digests)}
        described = {path: _described(table) for path, table in tables.items()}
        write_new(target / INDEX, json.dumps({"format": FORMAT, "files": files, "tables": described}).encode())


@torch.no_grad()
def load_tables(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Read the tables of `model`, each process what it holds, however many wrote them and whichever way they were cut.

    Raises CatalogError: PATH, FORMAT, HASH, SHAPE, INCOMPLETE.
    """
    tables, folder = _tables(model), Path(folder)
    processes, failure, index = _Processes(tables), None, {}
    try:
        index = _index(folder)
        for at, (name, sha256) in enumerate(sorted(index["files"].items())):
            if at % processes.count == processes.rank and _digest(folder / name) != sha256:
                raise CatalogError("HASH", name, f"it is not the file that {INDEX} was written for; copy it again.")
        for path, table in tables.items():
            _check(path, table, index["tables"].get(path))
    except Exception as error:
        failure = error
    processes.agree(failure, folder.name)
    for path, table in tables.items():
        _read_own(path, table, index["tables"][path], folder)


def _tables(model: nn.Module) -> dict[str, AbstractTable]:
    """By path, each once."""
    inside = {id(table.local) for table in model.modules() if isinstance(table, AbstractShardedTable)}
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, NeuronTable | AbstractShardedTable) and id(module) not in inside
    }


def _write_own(tables: Mapping[str, AbstractTable], target: Path) -> str:
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for path, table in tables.items():
        local = _local(table)
        tensors[f"{path}.rows"] = local.rows.detach().cpu().contiguous()
        if local.bias is not None:
            tensors[f"{path}.bias"] = local.bias.detach().cpu().contiguous()
        if local.frozen is not None:
            tensors[f"{path}.frozen"] = local.frozen.cpu()
    save_file(tensors, target)
    return sha256_file(target)


def _described(table: AbstractTable) -> dict[str, Any]:
    bias = _local(table).bias
    return {
        "shape": [table.num_experts, table.parts, table.width],
        "bias": bias is not None,
        "pieces": [[*piece.experts, *piece.columns] for piece in _pieces(table)],
    }


def _index(folder: Path) -> dict[str, Any]:
    try:
        raw = json.loads(read_regular(folder / INDEX, _INDEX_LIMIT))
        if raw["format"] != FORMAT:
            raise CatalogError("FORMAT", INDEX, f"format {raw['format']}; this mixwright reads {FORMAT}.")
        files = {str(name): str(sha256) for name, sha256 in raw["files"].items()}
        assert all(name == _name(rank, len(files)) for rank, name in enumerate(sorted(files)))
        return {
            "files": files,
            "tables": {str(path): _table(entry, len(files)) for path, entry in raw["tables"].items()},
        }
    except (FileNotFoundError, NotADirectoryError):
        raise CatalogError("PATH", folder.name, f"there is no {INDEX}; expected a folder of save_tables.") from None
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, RecursionError) as error:
        raise CatalogError("FORMAT", INDEX, f"it cannot be read ({type(error).__name__} {str(error)[:80]}).") from None


def _table(entry: dict[str, Any], count: int) -> dict[str, Any]:
    pieces = [tuple(int(n) for n in piece) for piece in entry["pieces"]]
    assert len(pieces) == count and all(len(piece) == 4 for piece in pieces)
    return {"shape": [int(n) for n in entry["shape"]], "bias": bool(entry["bias"]), "pieces": pieces}


def _check(path: str, table: AbstractTable, entry: dict[str, Any] | None) -> None:
    wanted = [table.num_experts, table.parts, table.width]
    if entry is None:
        raise CatalogError(
            "SHAPE", path, "the folder holds no table of that path; load it into the model that it is of."
        )
    local, first = _local(table), _own(table).columns[0] == 0  # biases stand with the first columns
    if entry["shape"] != wanted or (first and entry["bias"] != (local.bias is not None)):
        raise CatalogError(
            "SHAPE",
            path,
            f"the folder's table is {entry['shape']} {'with' if entry['bias'] else 'without'} biases, and the model's "
            f"is {wanted} {'without' if local.bias is None else 'with'}; load it into the model that it is of.",
        )


def _read_own(path: str, table: AbstractTable, entry: dict[str, Any], folder: Path) -> None:
    from safetensors import safe_open

    local = _local(table)
    (first, last), (start, end) = _own(table)
    for rank, (e0, e1, c0, c1) in enumerate(entry["pieces"]):
        experts, columns = (max(first, e0), min(last, e1)), (max(start, c0), min(end, c1))
        if experts[0] >= experts[1]:
            continue
        with safe_open(folder / _name(rank, len(entry["pieces"])), "pt") as file:
            into, source = slice(experts[0] - first, experts[1] - first), slice(experts[0] - e0, experts[1] - e0)
            if columns[0] < columns[1]:
                rows = file.get_slice(f"{path}.rows")[source, :, columns[0] - c0 : columns[1] - c0]
                local.rows[into, :, columns[0] - start : columns[1] - start] = rows.to(local.rows)
            held = set(file.keys())
            if local.bias is not None and f"{path}.bias" in held:
                local.bias[into] = file.get_slice(f"{path}.bias")[source].to(local.bias)
            if f"{path}.frozen" in held:
                if local.frozen is None:
                    local.frozen = torch.zeros(last - first, dtype=torch.bool, device=local.rows.device)
                local.frozen[into] = file.get_slice(f"{path}.frozen")[source].to(local.frozen)


def _local(table: AbstractTable) -> NeuronTable:
    local = table.local if isinstance(table, AbstractShardedTable) else table
    assert isinstance(local, NeuronTable)
    return local


def _pieces(table: AbstractTable) -> tuple[Piece, ...]:
    if isinstance(table, AbstractShardedTable):
        return table.pieces
    return (Piece((0, table.num_experts), (0, table.width)),)


def _own(table: AbstractTable) -> Piece:
    return _pieces(table)[dist.get_rank(table.group) if isinstance(table, AbstractShardedTable) else 0]


def _digest(path: Path) -> str:
    try:
        return sha256_file(path)
    except FileNotFoundError:
        raise CatalogError("PATH", path.name, f"it is missing, and {INDEX} names it; copy the whole folder.") from None


def _name(rank: int, count: int) -> str:
    return f"tables-{rank + 1:05d}-of-{count:05d}.safetensors"
