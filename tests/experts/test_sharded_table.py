"""Tables spread over processes, against the same table on one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mixwright.errors import CatalogError
from mixwright.experts.table import NeuronTable
from mixwright.experts.table_shards import INDEX, load_tables, save_tables
from mixwright.ops.wire import wire_bytes

HERE = Path(__file__).parent


def stored(parts: int, bias: bool, frozen: bool = False) -> nn.Module:
    """As `sharded_checks.layer` has it: experts.table."""
    torch.manual_seed(0)
    layer = nn.Module()
    layer.router, _ = nn.Linear(10, 6, bias=False), torch.randn(10, 35).double()
    layer.experts = nn.Module()
    table = NeuronTable(torch.randn(35, parts, 10), torch.randn(35, parts - 1) if bias else None)
    table.frozen = torch.arange(35) % 5 == 0 if frozen else None
    layer.experts.table = table
    return layer.double()


def pair() -> nn.ModuleList:
    return nn.ModuleList([stored(3, True, frozen=True), stored(2, False)])


def test_two_three_and_four_processes_equal_one(tmp_path: Path) -> None:
    save_tables(pair(), tmp_path / "one")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    launch = ("-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", "4", "--standalone")
    command = [sys.executable, *launch, str(HERE / "sharded_checks.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "18 comparisons" in done.stdout
    for by in ("columns", "rows"):  # saved on four, loaded on one
        model = pair()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        model[0].experts.table.frozen = None
        load_tables(model, tmp_path / by)
        for one, other in zip(model, pair()):
            assert torch.equal(one.experts.table.rows, other.experts.table.rows)
        assert torch.equal(model[0].experts.table.bias, pair()[0].experts.table.bias)
        assert torch.equal(model[0].experts.table.frozen, pair()[0].experts.table.frozen)


def test_shards_that_are_not_what_was_saved_are_refused(tmp_path: Path) -> None:
    save_tables(pair(), tmp_path / "saved")
    with pytest.raises(CatalogError, match="^PATH "):
        save_tables(pair(), tmp_path / "saved")
    with pytest.raises(CatalogError, match="^SHAPE 0.experts.table: .* without biases, and the model's is .* with;"):
        load_tables(nn.ModuleList([stored(2, True)]), _saved(nn.ModuleList([stored(2, False)]), tmp_path / "other"))
    with pytest.raises(CatalogError, match="^SHAPE 2.experts.table: the folder holds no table"):
        load_tables(nn.ModuleList([*pair(), stored(2, False)]), tmp_path / "saved")
    with pytest.raises(CatalogError, match="^PATH "):
        load_tables(pair(), tmp_path / "nowhere")
    (shard,) = (tmp_path / "saved").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-9] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CatalogError, match="^HASH tables-00001-of-00001.safetensors: "):
        load_tables(pair(), tmp_path / "saved")
    shard.unlink()
    with pytest.raises(CatalogError, match="^PATH tables-00001-of-00001.safetensors: "):
        load_tables(pair(), tmp_path / "saved")
    for text in (
        "",
        "{}",
        '{"format":1,"files":{"../a":"0"},"tables":{}}',
        '{"format":2,"files":{},"tables":{}}',
        "[]",
    ):
        (tmp_path / "saved" / INDEX).write_text(text)
        with pytest.raises(CatalogError, match="^FORMAT "):
            load_tables(pair(), tmp_path / "saved")


def _saved(model: nn.Module, folder: Path) -> Path:
    save_tables(model, folder)
    return folder


def test_bytes_on_the_wire_are_those_of_the_plan() -> None:
    """K 128, d 1024, bf16, 8 processes: the plan says about 16 KB by columns, 0.5 MB for rows that travel."""
    layer = {"width": 1024, "k": 128, "parts": 2, "processes": 8}
    small, large, beyond = (
        {by: sum(wire_bytes(by, num_experts=n, **layer).values()) for by in ("columns", "rows", "unpooled")}  # type: ignore[arg-type]
        for n in (1 << 14, 1 << 30, 1 << 32)
    )
    assert small == large
    assert small["columns"] == 4 * 128 * 7 * 3 + 2 * 2 * 1024 * 7 / 8 < 16 * 1024
    assert beyond["columns"] - large["columns"] == 4 * 128 * 7  # the index alone
    assert small["columns"] < 0.3 * small["rows"] and small["unpooled"] > 30 * small["columns"]
