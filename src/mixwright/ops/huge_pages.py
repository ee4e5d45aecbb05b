"""Memory on huge pages: rows read in random order miss the processor's page table less often, which is 1.2x to 1.5x.

Linux gives such pages to whoever asks (`madvise`), before the memory is written for the first time. Where that can't be
had, the memory is as any other.
"""

import ctypes
import mmap
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

SIZE = 1 << 21
COLLAPSE = 25
"""MADV_COLLAPSE of Linux 6.1: move what is there already, now."""


def on_huge_pages(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """An empty tensor in memory of this machine, on huge pages where it is large enough and they are to be had."""
    return advise(torch.empty(*shape, dtype=dtype))


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.zeros`, but memory that nobody writes to is never touched; on huge pages."""
    size = torch.Size(shape).numel() * dtype.itemsize
    if device.type != "cpu" or size < SIZE or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(*shape, dtype=dtype, device=device)
    return _tensor(_map(size), shape, dtype)


class SpareMemory:
    """Memory that is lent out again once every tensor on it is gone.

    Memory fresh from the system is cleared a page at a time, which takes longer than most of what is written to it.
    """

    def __init__(self) -> None:
        self._held: mmap.mmap | None = None
        self._lent: weakref.ref[memoryview] | None = None

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor with whatever was in its memory before."""
        size = torch.Size(shape).numel() * dtype.itemsize
        if device.type != "cpu" or size < SIZE or not hasattr(mmap, "MAP_ANONYMOUS"):
            return torch.empty(*shape, dtype=dtype, device=device)
        if self._lent is not None and self._lent() is not None:
            return _tensor(_map(size), shape, dtype)
        if self._held is None or not size <= len(self._held) <= 4 * size:
            self._held = None  # before the other is made
            self._held = _map(size + size // 8)
        view = memoryview(self._held)
        self._lent = weakref.ref(view)
        return _tensor(view, shape, dtype)

    def release(self) -> None:
        """Give back what is not lent out, and forget what is."""
        self._held = self._lent = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "SpareMemory":
        """A copy starts with none."""
        return SpareMemory()

    def __reduce__(self) -> tuple[type["SpareMemory"], tuple[()]]:
        """Nothing of it is saved."""
        return SpareMemory, ()


def _map(size: int) -> mmap.mmap:
    """Memory of zeros that takes no room until it is written to."""
    held = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    advise(torch.frombuffer(held, dtype=torch.uint8))
    return held


def _tensor(memory: mmap.mmap | memoryview, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(memory, dtype=dtype, count=torch.Size(shape).numel()).view(*shape)


def advise(tensor: Tensor, *, collapse: bool = False) -> Tensor:
    """Ask for huge pages under `tensor`; with `collapse` for what it holds already too, which copies it once."""
    madvise, huge = _madvise(), getattr(mmap, "MADV_HUGEPAGE", None)
    if madvise is None or huge is None or tensor.device.type != "cpu" or type(tensor.data) is not Tensor:
        return tensor
    start = -(-tensor.data_ptr() // SIZE) * SIZE
    size = (tensor.data_ptr() + tensor.nbytes - start) // SIZE * SIZE
    if size > 0:
        for advice in (huge, COLLAPSE) if collapse else (huge,):
            madvise(start, size, advice)
    return tensor


@cache  # of the C library that the process has
def _madvise() -> Callable[[int, int, int], int] | None:
    try:
        madvise = ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):
        return None
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise
