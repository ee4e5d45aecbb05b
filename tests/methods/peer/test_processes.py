"""Usage and rebalancing over two processes are those of one that saw everything."""

import subprocess
import sys
from pathlib import Path

import torch

from .two_meters import observed


def test_two_processes_count_and_balance_as_one(tmp_path: Path) -> None:
    script = Path(__file__).parent / "two_meters.py"
    running = [subprocess.Popen([sys.executable, str(script), str(tmp_path), str(rank)]) for rank in range(2)]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    whole = observed([0, 1])
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert int(found["tokens"]) == 9
        assert all(torch.allclose(found[name].double(), whole[name].double()) for name in whole), rank
