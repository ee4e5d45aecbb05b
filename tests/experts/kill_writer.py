"""Run as a script: writers of a table are killed with SIGKILL at random moments while readers look at it.

`python kill_writer.py FOLDER KILLS` prints one JSON line for the sound writer and one for its naive twin, which writes
over the file: kills, broken files found after one, versions that came through, and readers that saw a mixture of two.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mixwright.errors import CatalogError
from mixwright.experts import disk_table
from mixwright.experts.disk_table import DiskTable, write_table
from mixwright.experts.row_file import header, row_format
from mixwright.experts.table import NeuronTable

EXPERTS = 300


def table(version: int) -> NeuronTable:
    return NeuronTable(torch.full((EXPERTS, 2, 16), float(version)))


def naive(version: NeuronTable, path: Path) -> None:
    form = row_format(EXPERTS, {"rows": version.rows[:1]})
    with open(path, "wb", buffering=0) as file:
        file.write(header(form, "0" * 64))
        for block in disk_table._blocks(version, 20):  # pyright: ignore[reportPrivateUsage]
            file.write(form.records(block).tobytes())


def slow(blocks: Callable) -> Callable:
    def slowly(*arguments: object):
        for block in blocks(*arguments):
            time.sleep(0.004)
            yield block

    return slowly


def content(path: Path) -> set[float]:
    disk = DiskTable(path, cache_bytes=0)
    return set(disk.take(torch.arange(EXPERTS))[0].flatten().tolist())


def child(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


def read(path: Path) -> None:
    until = time.monotonic() + 0.08
    while time.monotonic() < until:
        assert len(content(path)) == 1


def run(path: Path, kills: int, write: Callable[[NeuronTable, Path], None]) -> dict[str, int]:
    draw, last = random.Random(0), 0.0
    counts = {"kills": 0, "broken": 0, "replaced": 0, "readers_wrong": 0}
    write_table(table(0), path)
    began = time.monotonic()
    os.waitpid(child(lambda: write(table(0), path)), 0)
    length = time.monotonic() - began
    while counts["kills"] < kills:
        version = counts["kills"] + 1
        writer, reader = child(lambda version=version: write(table(version), path)), child(lambda: read(path))
        time.sleep(draw.uniform(0.0, 1.2) * length)
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        counts["kills"] += 1
        try:
            found = content(path)
            counts["broken"] += len(found) > 1
            counts["replaced"] += found != {last}
            last = min(found)
        except CatalogError:
            counts["broken"] += 1
            write_table(table(0), path)
        counts["readers_wrong"] += os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1])
    return counts


if __name__ == "__main__":
    torch.set_num_threads(1)
    disk_table._BLOCK, disk_table._blocks = 20 * 128, slow(disk_table._blocks)  # pyright: ignore[reportPrivateUsage]
    for name, way in (("sound", write_table), ("naive", naive)):
        print(json.dumps(run(Path(sys.argv[1]) / f"{name}.table", int(sys.argv[2]), way)), flush=True)
