"""Tables on a disk: the same bits as in memory, no read that is not needed, and never half a file."""

import copy
import ctypes
import json
import mmap
import os
import pickle
import random
import resource
import subprocess
import sys
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from mixwright.errors import CatalogError
from mixwright.experts import fetched, row_reader
from mixwright.experts.disk_table import DiskTable, to_disk, write_table
from mixwright.experts.row_file import PAGE, RowFormat, header, row_format
from mixwright.experts.table import NeuronTable
from mixwright.ops import kernels, neuron
from mixwright.ops.neuron_kernel import CompiledPasses

HERE = Path(__file__).parent


def memory_table(parts: int = 2, width: int = 24, dtype: torch.dtype = torch.float32, bias: bool = False, n: int = 90):
    torch.manual_seed(parts)
    rows = torch.randn(n, parts, width).to(dtype)
    return NeuronTable(rows, torch.randn(n, parts - 1).to(dtype) if bias else None).requires_grad_(False)


def retrieval(tokens: int, k: int, n: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(tokens, k, generator=generator)
    return torch.where(weights < 0.2, 0.0, weights), torch.randint(n, (tokens, k), generator=generator)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_to_the_bit_to_the_table_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, parts: int, mapped: bool
) -> None:
    table = memory_table(parts, dtype=dtype, bias=parts > 1)
    write_table(table, tmp_path / "rows.table")
    disk = DiskTable(tmp_path / "rows.table", cache_bytes=4000, mapped=mapped)
    assert (disk.num_experts, disk.parts, disk.width) == (90, parts, 24) and not disk.state_dict()
    for tokens, budget in ((0, 1 << 28), (1, 1 << 28), (13, 1 << 28), (13, 9000)):
        monkeypatch.setattr(fetched, "_BUDGET", budget)
        x = torch.randn(tokens, 24, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        weights, indices = retrieval(tokens, 7, 90, tokens)
        assert torch.equal(disk(x, weights, indices, "gelu"), table(x, weights, indices, "gelu"))
    disk.verify()


@pytest.mark.parametrize("n", [10, 40, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_to_the_bit_by_the_compiled_way_and_for_few_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: kernels.Kernels, n: int, dtype: torch.dtype
) -> None:
    """Also where so few distinct experts are retrieved that a table of as many would be multiplied whole."""
    taken: list[int] = []
    plain = CompiledPasses.forward
    monkeypatch.setattr(neuron.kernels, "kernel", lambda: compiled)
    monkeypatch.setattr(CompiledPasses, "forward", lambda *given, **kept: (taken.append(1), plain(*given, **kept))[1])
    table = memory_table(3, n=n, dtype=dtype, bias=True)
    disk = to_disk(table, tmp_path / "rows.table", cache_bytes=4000)
    for tokens, seen, budget in ((1, n, 1 << 28), (9, n, 1 << 28), (40, n, 1 << 28), (40, 5, 1 << 28), (40, n, 3000)):
        monkeypatch.setattr(fetched, "_BUDGET", budget if n > 16 else 1 << 28)
        weights, indices = retrieval(tokens, 8, seen, tokens)
        x = torch.randn(tokens, 24)
        assert torch.equal(disk(x, weights, indices, "gelu"), table(x, weights, indices, "gelu"))
    assert len(taken) >= (10 if n > 16 else 2)


def test_tokens_and_weights_have_their_gradients(tmp_path: Path) -> None:
    table = memory_table(3)
    disk = to_disk(table, tmp_path / "rows.table")
    weights, indices = retrieval(5, 4, 90)
    gradients = []
    for each in (table, disk):
        x, w = torch.ones(5, 24, requires_grad=True), weights.clone().requires_grad_()
        gradients.append(torch.autograd.grad(each(x, w, indices, "silu").square().sum(), (x, w)))
    for one, other in zip(*gradients):
        assert torch.equal(one, other)


def test_every_read_is_a_unique_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = memory_table(width=512)  # a record of one page
    disk = to_disk(table, tmp_path / "rows.table", cache_bytes=20 * PAGE)
    form, pinned = disk.reader.form, torch.tensor([3, 4, 5, 80])
    assert form.stride == PAGE and disk.cache.capacity == 20
    seen: list[tuple[int, int]] = []
    plain = os.preadv

    def counting(descriptor: int, buffers: list[memoryview], place: int) -> int:
        seen.append((place, sum(len(buffer) for buffer in buffers)))
        return plain(descriptor, buffers, place)

    monkeypatch.setattr(row_reader.os, "preadv", counting)
    disk.pin(pinned)
    assert len(seen) == disk.reader.reads == 2 and sum(size for _, size in seen) == 4 * PAGE  # 3, 4, 5 are one read
    oracle: OrderedDict[int, None] = OrderedDict()
    rows_before, missed, hit = disk.reader.rows_read, 0, 0
    for turn in range(12):
        weights, indices = retrieval(4, 6, 90, turn)
        seen.clear()
        disk(torch.ones(4, 512), weights, indices, "relu")
        wanted = sorted(set(indices[weights != 0].tolist()) - set(pinned.tolist()))
        hit += len(set(indices[weights != 0].tolist()) & set(pinned.tolist()))
        misses = [at for at in wanted if at not in oracle]
        read = [disk.reader.offset + at * PAGE for at in misses]
        assert sum(size for _, size in seen) == len(misses) * PAGE
        assert [place + PAGE * n for place, size in seen for n in range(size // PAGE)] == read  # ascending, each once
        for at in wanted:
            if at in oracle:
                oracle.move_to_end(at)
        for at in misses:
            if len(oracle) == 20:
                oracle.popitem(last=False)
            oracle[at] = None
        missed, hit = missed + len(misses), hit + len(wanted) - len(misses)
    assert disk.cache.misses == missed == disk.reader.rows_read - rows_before and disk.cache.hits == hit


def sparse_table(path: Path, gigabytes: int, some: dict[int, torch.Tensor]) -> RowFormat:
    form = row_format(gigabytes << 18, {"rows": torch.empty(1, 2, 512)})  # a page each
    with open(path, "wb") as file:
        file.write(header(form, "0" * 64))
        offset = file.tell()
        file.truncate(offset + form.num_experts * form.stride)
        for at, row in some.items():
            file.seek(offset + at * form.stride)
            file.write(row.numpy().tobytes())
    return form


def virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_table_far_larger_than_the_address_space_it_may_use(tmp_path: Path) -> None:
    torch.manual_seed(0)
    some = {at: torch.randn(2, 512) for at in (0, 77, 1 << 20, (64 << 18) - 1)}
    form = sparse_table(tmp_path / "rows.table", 64, some)
    assert (tmp_path / "rows.table").stat().st_size > 64 << 30 > form.num_experts
    ids = torch.tensor([sorted(some)])
    small = NeuronTable(torch.stack([some[at] for at in sorted(some)]))
    x, weights = torch.randn(1, 512), torch.rand(1, 4)
    expected = small(x, weights, torch.arange(4)[None], "gelu")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (virtual_bytes() + (512 << 20), hard))
    try:
        with pytest.raises(OSError, match="allocate"):
            DiskTable(tmp_path / "rows.table", mapped=True)  # the limit bites: the whole file cannot be mapped
        found = DiskTable(tmp_path / "rows.table")(x, weights, ids, "gelu")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert torch.equal(found, expected)
    mapped = DiskTable(tmp_path / "rows.table", mapped=True)
    assert torch.equal(mapped(x, weights, ids, "gelu"), expected)
    assert mapped.reader.rows_read == mapped.cache.misses == 4


@pytest.mark.skipif(sys.platform != "linux", reason="asks mincore which pages are in memory")
def test_mapped_pages_that_come_into_memory_are_those_of_the_retrieved_rows(tmp_path: Path) -> None:
    sparse_table(tmp_path / "rows.table", 1, {})
    disk = DiskTable(tmp_path / "rows.table", mapped=True)
    assert isinstance(disk.reader, row_reader.MappedReader)
    records = disk.reader._records  # pyright: ignore[reportPrivateUsage]
    pages, mincore = len(records), ctypes.CDLL(None).mincore
    state = np.empty(pages, np.uint8)

    def resident() -> list[int]:
        code = mincore(
            ctypes.c_void_p(records.ctypes.data), ctypes.c_size_t(pages * PAGE), state.ctypes.data_as(ctypes.c_void_p)
        )
        assert code == 0
        return np.flatnonzero(state & 1).tolist()

    os.posix_fadvise(disk.reader.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    before = set(resident())
    weights, indices = retrieval(9, 5, pages, 3)
    disk(torch.ones(9, 512), weights, indices, "relu")
    wanted = set(indices[weights != 0].tolist())
    assert not before and set(resident()) == wanted and disk.reader.rows_read == len(wanted)


@pytest.mark.slow
def test_kill_9_while_saving_leaves_a_whole_table_and_the_naive_twin_does_not(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "kill_writer.py"), str(tmp_path), "15"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    sound, naive = (json.loads(line) for line in done.stdout.splitlines())
    assert sound["kills"] == 15 and sound["broken"] == 0 and sound["readers_wrong"] == 0 and sound["replaced"] > 0
    assert naive["broken"] > 0 and naive["readers_wrong"] > 0


def test_threads_share_one_table(tmp_path: Path) -> None:
    table = memory_table()
    disk = to_disk(table, tmp_path / "rows.table", cache_bytes=2000)

    def once(seed: int) -> bool:
        weights, indices = retrieval(6, 5, 90, seed)
        x = torch.full((6, 24), float(seed))
        return torch.equal(disk(x, weights, indices, "gelu"), table(x, weights, indices, "gelu"))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(once, range(64)))
    assert disk.cache.misses == disk.reader.rows_read


def test_a_replaced_file_leaves_its_readers_alone_and_copies_open_it_anew(tmp_path: Path) -> None:
    path = tmp_path / "rows.table"
    disk = to_disk(memory_table(), path)
    disk.pin(torch.tensor([1, 2]))
    old = disk.take(torch.tensor([5, 2, 5]))[0]
    assert torch.equal(old, memory_table().rows[[5, 2, 5]])
    copies = [copy.deepcopy(disk), pickle.loads(pickle.dumps(disk))]
    write_table(NeuronTable(torch.zeros(90, 2, 24)), path)
    for each in (disk, *copies):
        assert torch.equal(each.take(torch.tensor([7]))[0], memory_table().rows[[7]])
    assert not DiskTable(path).take(torch.tensor([7]))[0].any()


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    good = tmp_path / "good.table"
    write_table(memory_table(), good)
    data = good.read_bytes()
    length = int.from_bytes(data[8:16], "little")

    def refused(code: str, content: bytes) -> None:
        (tmp_path / "bad.table").write_bytes(content)
        with pytest.raises(CatalogError, match=f"^{code} bad.table: "):
            DiskTable(tmp_path / "bad.table")

    refused("SIZE", data[:-1])
    refused("SIZE", data + b"\x00")
    refused("HEADER", b"")
    refused("HEADER", b"x" * 9000)
    refused("VERSION", data[:7] + b"\x02" + data[8:])
    refused("HEADER", data[:60] + bytes([data[60] ^ 1]) + data[61:])
    refused("HEADER", data[:8] + (1 << 40).to_bytes(8, "little") + data[16:])
    refused("HEADER", data[: 48 + length // 2])
    other = row_format(90, {"rows": torch.empty(1, 4, 24)})
    refused("SHAPE", header(other, "0" * 64) + bytes(90 * other.stride))
    (tmp_path / "link.table").symlink_to(good)
    for name in ("link.table", "nothing.table"):
        with pytest.raises(CatalogError, match="^PATH "):
            DiskTable(tmp_path / name)
    flipped = bytearray(data)
    flipped[-3000] ^= 1
    (tmp_path / "bad.table").write_bytes(flipped)
    with pytest.raises(CatalogError, match="^HASH bad.table: "):
        DiskTable(tmp_path / "bad.table").verify()
    with pytest.raises(IndexError, match="of a table of 90 experts"):
        DiskTable(good).take(torch.tensor([90]))


def test_a_header_of_random_damage_is_refused_by_name(tmp_path: Path) -> None:
    write_table(memory_table(), tmp_path / "rows.table")
    data, draw = (tmp_path / "rows.table").read_bytes(), random.Random(0)
    length = int.from_bytes(data[8:16], "little")
    for _ in range(300):
        bad = bytearray(data)
        for _ in range(draw.randint(1, 4)):
            bad[draw.randrange(48 + length)] = draw.randrange(256)
        if bad == data:
            continue
        (tmp_path / "bad.table").write_bytes(bad)
        with pytest.raises(CatalogError):
            DiskTable(tmp_path / "bad.table")


def test_a_file_cut_off_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    disk = to_disk(memory_table(), tmp_path / "rows.table", cache_bytes=0)
    os.truncate(tmp_path / "rows.table", PAGE + 100)
    with pytest.raises(CatalogError, match="^SIZE rows.table: it ends before byte"):
        disk.take(torch.tensor([89]))
