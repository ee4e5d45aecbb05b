"""A layer's and a model's rows in fewer bits, in a file, on several processes: what they say, and what is saved."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

import mixwright as mw
from mixwright.backbones.tiny import tiny_backbone
from mixwright.errors import CatalogError
from mixwright.experts.disk_table import DiskTable, write_table
from mixwright.experts.quantised_table import QuantisedTable
from mixwright.experts.sharded_table import ColumnTable
from mixwright.experts.sharding import shard, unshard
from mixwright.experts.table import NeuronTable
from mixwright.methods.peer.composed import PeerComposedModel
from mixwright.methods.peer.layer import PEER


def layer() -> PEER:
    torch.manual_seed(0)
    return PEER(24, (12, 12), heads=2, top_k=4, dim_key=8, gated=True).eval()


def composed(shared: bool = False) -> PeerComposedModel:
    torch.manual_seed(0)
    model = mw.compose(
        "peer", backbone=tiny_backbone("llama"), sites="all", mode="parallel", num_experts=(6, 8), heads=2, top_k=3,
        dim_key=8, shared_table=shared,
    )  # fmt: skip
    assert isinstance(model, PeerComposedModel)
    with torch.no_grad():
        for _, experts in model.layers.values():
            experts.table.get_parameter("rows").normal_()
    return model.eval()


IDS = torch.arange(12)[None] + 5


@torch.no_grad()
def output(model: PeerComposedModel) -> Tensor:
    return model(input_ids=IDS).logits


@torch.no_grad()
def test_a_layer_in_fewer_bits() -> None:
    x = torch.randn(30, 24)
    exact = layer()(x)
    for dtype, low, high in (("int8", 0.003, 0.02), ("bfloat16", 0.0005, 0.005)):
        small = layer().quantize(dtype)  # type: ignore[arg-type]
        assert low < float((small(x) - exact).norm() / exact.norm()) < high
    assert isinstance(layer().quantize().experts.table, QuantisedTable)
    with pytest.raises(ValueError, match="dtype='int4'; accepted are 'int8' and 'bfloat16'"):
        layer().quantize("int4")  # type: ignore[arg-type]


@torch.no_grad()
def test_a_layer_on_a_disk(tmp_path: Path) -> None:
    x = torch.randn(2, 15, 24)
    exact, disk = layer()(x), layer().to_disk(tmp_path / "rows.table")
    assert torch.equal(disk(x), exact) and not any("table" in name for name in disk.state_dict())
    again = PEER(24, (12, 12), heads=2, top_k=4, dim_key=8, gated=True, table=DiskTable(tmp_path / "rows.table"))
    again.load_state_dict(disk.state_dict())
    assert torch.equal(again.eval()(x), exact)


@pytest.mark.parametrize("shared", [False, True])
def test_a_model_on_a_disk_names_its_files(tmp_path: Path, shared: bool) -> None:
    model = composed(shared)
    exact, sites = output(model), list(model.layers)
    model.to_disk(tmp_path / "rows")
    assert len({experts.table for _, experts in model.layers.values()}) == (1 if shared else len(sites))
    assert torch.equal(output(model), exact)
    model.save_pretrained(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "added.safetensors")
    assert not any(name.endswith("rows") for name in stored)
    assert sum(name.endswith("table.file") for name in stored) == (1 if shared else len(sites))
    again = mw.load(tmp_path / "saved", backbone=tiny_backbone("llama"))
    assert isinstance(again, PeerComposedModel) and torch.equal(output(again.eval()), exact)
    file = tmp_path / "rows" / f"{sites[0]}.rows"
    write_table(NeuronTable(torch.zeros(48, 2, DiskTable(file).width)), file)
    with pytest.raises(CatalogError, match="^HASH .*it holds other rows"):
        mw.load(tmp_path / "saved", backbone=tiny_backbone("llama"))
    file.unlink()
    with pytest.raises(CatalogError, match="^PATH .*there is no such file"):
        mw.load(tmp_path / "saved", backbone=tiny_backbone("llama"))


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_a_model_in_fewer_bits_is_saved_as_it_is(tmp_path: Path, dtype: str) -> None:
    model = composed()
    model.quantize(dtype)  # type: ignore[arg-type]
    model.save_pretrained(tmp_path / "saved")
    again = mw.load(tmp_path / "saved", backbone=tiny_backbone("llama"))
    assert isinstance(again, PeerComposedModel) and torch.equal(output(again.eval()), output(model))
    kept = [name for name in load_file(tmp_path / "saved" / "added.safetensors") if name.endswith("rows")]
    assert len(kept) == len(model.layers)


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_sharded_model_is_not_saved_by_halves(tmp_path: Path, alone: None) -> None:
    model = composed()
    exact = output(model)
    shard(model)
    assert all(isinstance(experts.table, ColumnTable) for _, experts in model.layers.values())
    torch.testing.assert_close(output(model), exact, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="lies on several processes; call experts.sharding.unshard"):
        model.save_pretrained(tmp_path / "saved")
    unshard(model).save_pretrained(tmp_path / "saved")
    again = mw.load(tmp_path / "saved", backbone=tiny_backbone("llama"))
    assert isinstance(again, PeerComposedModel) and torch.equal(output(again.eval()), exact)
