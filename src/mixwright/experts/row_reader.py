"""Records out of a row file: read one by one or mapped into memory, counted, and kept in a bounded cache."""

import hashlib
import mmap
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixwright.errors import CatalogError
from mixwright.experts.row_file import Records, open_row_file

Ids = NDArray[np.int64]
_SPAN = 1 << 20  # bytes of one read at most


class AbstractReader(ABC):
    """Records of ids out of an open file. `rows_read` counts the records that were asked of the file, `reads` the
    requests they took: neighbours share one."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(path)
        self.descriptor, self.form, self.offset, self.sha256 = open_row_file(path)
        self._close = weakref.finalize(self, os.close, self.descriptor)
        self.rows_read = self.reads = 0
        self._counting = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)

    @abstractmethod
    def read(self, ids: Ids) -> Records:
        """The records of ids that are distinct and ascending."""

    def verify(self) -> None:
        """Read the whole file and compare its SHA-256 with the header's. Raises CatalogError (HASH)."""
        digest = hashlib.sha256()
        place, end = self.offset, self.offset + self.form.num_experts * self.form.stride
        while place < end:
            data = os.pread(self.descriptor, min(_SPAN, end - place), place)
            if not data:
                break
            digest.update(data)
            place += len(data)
        if digest.hexdigest() != self.sha256:
            raise CatalogError(
                "HASH",
                os.path.basename(self.path),
                f"its rows have the SHA-256 {digest.hexdigest()} and its header says {self.sha256}; copy it again.",
            )

    def _runs(self, ids: Ids) -> list[tuple[int, int]]:
        """Neighbouring ids as ranges of positions."""
        longest = max(1, _SPAN // self.form.stride)
        cuts = np.flatnonzero(np.diff(ids) != 1) + 1
        runs: list[tuple[int, int]] = []
        for start, end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(ids)]):
            runs += [(at, min(at + longest, end)) for at in range(start, end, longest)]
        return runs

    def _count(self, rows: int, reads: int) -> None:
        with self._counting:
            self.rows_read += rows
            self.reads += reads


class RowReader(AbstractReader):
    """Each record by a read of its own. A file that is cut off under its reader is an error, not the end of it.

    All of a call's places are first announced, so that a disk fetches them side by side.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def read(self, ids: Ids) -> Records:
        """The records of ids that are distinct and ascending, in reads of ascending places."""
        form, out = self.form, np.empty((len(ids), self.form.record), np.uint8)
        runs = self._runs(ids) if len(ids) else []
        places = [self.offset + int(ids[start]) * form.stride for start, _ in runs]
        lengths = [(end - start - 1) * form.stride + form.record for start, end in runs]
        if len(runs) > 1 and hasattr(os, "posix_fadvise"):
            for place, length in zip(places, lengths):
                os.posix_fadvise(self.descriptor, place, length, os.POSIX_FADV_WILLNEED)
        for (start, end), place, length in zip(runs, places, lengths):
            if end == start + 1:
                self._fill(out[start], place)
                continue
            span = np.zeros((end - start, form.stride), np.uint8)
            self._fill(span.reshape(-1)[:length], place)
            out[start:end] = span[:, : form.record]
        self._count(len(ids), len(runs))
        return out

    def _fill(self, target: NDArray[np.uint8], place: int) -> None:
        while len(target):
            got = os.preadv(self.descriptor, [target.data], place)
            if not got:
                raise CatalogError(
                    "SIZE", os.path.basename(self.path), f"it ends before byte {place}: it was cut off while in use."
                )
            target, place = target[got:], place + got


class MappedReader(AbstractReader):
    """The file mapped into memory: the system's page cache is the cache, and pages come one fault at a time.

    A file that is cut off while it is mapped ends the process (SIGBUS); take `RowReader` where that can happen.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        form = self.form
        self._map = mmap.mmap(self.descriptor, 0, prot=mmap.PROT_READ)
        if hasattr(mmap, "MADV_RANDOM"):
            self._map.madvise(mmap.MADV_RANDOM)  # a fault brings its own page, not its neighbours
        count = form.num_experts * form.stride
        self._records = np.frombuffer(self._map, np.uint8, count, self.offset).reshape(-1, form.stride)

    def read(self, ids: Ids) -> Records:
        """The records of ids that are distinct and ascending."""
        runs = self._runs(ids) if len(ids) else []
        if hasattr(mmap, "MADV_WILLNEED"):
            for start, end in runs:
                first = (self.offset + int(ids[start]) * self.form.stride) // mmap.PAGESIZE * mmap.PAGESIZE
                last = self.offset + int(ids[end - 1]) * self.form.stride + self.form.record
                self._map.madvise(mmap.MADV_WILLNEED, first, last - first)
        self._count(len(ids), len(runs))
        return self._records[ids, : self.form.record]


class CachedReader:
    """Records by way of a cache of at most `capacity` records, the longest unused leaving first, and of pinned ones.

    `hits` and `misses` count distinct ids of each call; every miss is one record read. Threads may share one.
    """

    def __init__(self, reader: AbstractReader, capacity: int) -> None:
        self.reader, self.capacity = reader, capacity
        self.hits = self.misses = 0
        self._lock = threading.Lock()
        self._slots: OrderedDict[int, int] = OrderedDict()
        self._store = np.empty((capacity, reader.form.record), np.uint8)
        self._pinned_ids: Ids = np.empty(0, np.int64)
        self._pinned: Records = np.empty((0, reader.form.record), np.uint8)

    def __reduce__(self) -> tuple[Any, ...]:
        return _cached, (self.reader, self.capacity, self._pinned_ids)

    def pin(self, ids: Ids) -> None:
        """Keep these records, and no others, in memory for good."""
        wanted = np.unique(ids)
        records = self.reader.read(wanted)
        with self._lock:
            self._pinned_ids, self._pinned = wanted, records

    def read(self, ids: Ids) -> Records:
        """The records of ids that are distinct and ascending."""
        out = np.empty((len(ids), self.reader.form.record), np.uint8)
        with self._lock:
            open_at = self._from_pinned(ids, out)
            slots = [self._slots.get(at, -1) for at in ids[open_at].tolist()]
            kept = np.asarray(slots, np.int64)
            out[open_at[kept >= 0]] = self._store[kept[kept >= 0]]
            missing = open_at[kept < 0]
            for at in ids[open_at[kept >= 0]].tolist():
                self._slots.move_to_end(at)
            out[missing] = fresh = self.reader.read(ids[missing])
            self._keep(ids[missing], fresh)
            self.hits += len(ids) - len(missing)
            self.misses += len(missing)
        return out

    def _from_pinned(self, ids: Ids, out: Records) -> Ids:
        """Fill in what is pinned; the positions that are left."""
        if not len(self._pinned_ids):
            return np.arange(len(ids))
        at = np.searchsorted(self._pinned_ids, ids).clip(max=len(self._pinned_ids) - 1)
        found = self._pinned_ids[at] == ids
        out[found] = self._pinned[at[found]]
        return np.flatnonzero(~found)

    def _keep(self, ids: Ids, records: Records) -> None:
        first = max(0, len(ids) - self.capacity)
        slots: list[int] = []
        for at in ids[first:].tolist():
            slot = len(self._slots) if len(self._slots) < self.capacity else self._slots.popitem(last=False)[1]
            self._slots[at] = slot
            slots.append(slot)
        if slots:
            self._store[slots] = records[first:]


def _cached(reader: AbstractReader, capacity: int, pinned: Ids) -> CachedReader:
    copy = CachedReader(reader, capacity)
    if len(pinned):
        copy.pin(pinned)
    return copy
