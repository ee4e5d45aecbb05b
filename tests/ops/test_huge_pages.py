"""Memory on huge pages is memory like any other; on Linux it is there where it was asked for."""

import re
from pathlib import Path

import pytest
import torch

from mixwright.experts.table import NeuronTable
from mixwright.ops.huge_pages import SIZE, advise, on_huge_pages, zeros


def huge_bytes(tensor):
    """Bytes on huge pages in the mapping that holds the tensor, as the kernel counts them."""
    place, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        span = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if span:
            inside = int(span[1], 16) <= place < int(span[2], 16)
        elif inside and line.startswith("AnonHugePages"):
            return int(line.split()[1]) << 10
    return 0


@pytest.fixture
def madvised():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this machine has no huge pages to give")


def test_memory_is_on_huge_pages_where_they_are_to_be_had(madvised):
    empty = on_huge_pages((5, SIZE), torch.float32).fill_(1)
    clear = zeros((5, SIZE), torch.float32, torch.device("cpu"))
    assert not clear.any()
    clear.fill_(1)
    assert min(huge_bytes(empty), huge_bytes(clear)) >= 3 * SIZE


def test_a_table_is_on_huge_pages_and_stays_there(madvised):
    table = NeuronTable(torch.ones(5 * SIZE // 64, 2, 64))
    if not huge_bytes(table.rows):
        pytest.skip("this kernel moves no memory onto huge pages (Linux 6.1 does)")
    assert huge_bytes(table.bfloat16().rows) >= 3 * SIZE and table.rows.dtype == torch.bfloat16


def test_small_odd_and_foreign_memory_is_left_as_it_is():
    for tensor in (torch.ones(3), torch.ones(0), torch.empty(2, 2, device="meta"), torch.ones(SIZE)[1:-1]):
        assert advise(tensor, collapse=True) is tensor
    assert zeros((3, 0, 2), torch.bfloat16, torch.device("cpu")).shape == (3, 0, 2)
    assert not zeros((3, 2), torch.float64, torch.device("cpu")).any()
    grown = zeros((SIZE, 2), torch.bfloat16, torch.device("cpu"))
    grown[7] = 1
    assert grown.sum() == 2
