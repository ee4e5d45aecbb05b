"""Run under torchrun with four processes, which also form groups of two and three: sharded tables against whole ones."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mixwright.experts.neuron import NeuronExperts
from mixwright.experts.sharded_table import AbstractShardedTable
from mixwright.experts.sharding import gathered_state, shard, sharded_parameters, tables_of, unshard
from mixwright.experts.table import NeuronTable
from mixwright.routing import Condition, Routing

WIDTH, COUNTS = 10, (3, 0, 5, 2)


class Layer(nn.Module):
    """Neurons chosen and weighed by projections of the token: 6 of 35, some by two tokens, some by none."""

    def __init__(self, parts: int, bias: bool, gradient: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router, self.chosen = nn.Linear(WIDTH, 6, bias=False), torch.randn(WIDTH, 35).double()
        table = NeuronTable(torch.randn(35, parts, WIDTH), torch.randn(35, parts - 1) if bias else None)
        table.gradient = gradient  # type: ignore[assignment]
        self.experts = NeuronExperts(table, "gelu")
        self.double()

    def indices(self, x: Tensor) -> Tensor:
        return (x.detach() @ self.chosen).topk(6).indices

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, Routing(self.router(x).softmax(-1), 35, self.indices(x)), Condition())


def layer(parts: int = 2, bias: bool = False, gradient: str = "dense") -> Layer:
    return Layer(parts, bias, gradient)


def tokens(counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(sum(counts), WIDTH).double(), torch.randn(sum(counts), WIDTH).double()


def own(values: Tensor, counts: tuple[int, ...], rank: int) -> Tensor:
    return values.split(list(counts))[rank]


def close(found: Tensor | None, expected: Tensor | None) -> None:
    assert (found is None) == (expected is None)
    if found is not None:
        found = found.to_dense() if found.is_sparse else found
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def piece(table: AbstractShardedTable, rank: int, values: Tensor) -> Tensor:
    (first, last), (start, end) = table.pieces[rank]
    return values[first:last, :, start:end]


def equal_to_one(by: str, parts: int, bias: bool, gradient: str, counts: tuple[int, ...], group: object) -> None:
    """Outputs and all gradients: the whole layer on all tokens here, the sharded one on this process's."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    x, direction = tokens(counts)
    whole, parted = layer(parts, bias), shard(layer(parts, bias, gradient), group, by=by)  # type: ignore[arg-type]
    all_x, own_x = x.clone().requires_grad_(), own(x, counts, rank).clone().requires_grad_()
    expected, found = whole(all_x), parted(own_x)
    close(found, own(expected, counts, rank))
    (expected * direction).sum().backward()
    (found * own(direction, counts, rank)).sum().backward()
    close(own_x.grad, own(all_x.grad, counts, rank))
    for (name, one), (other, mine) in zip(whole.router.named_parameters(), parted.router.named_parameters()):
        assert name == other
        summed = torch.zeros_like(mine) if mine.grad is None else mine.grad.clone()
        dist.all_reduce(summed, group=group)
        close(summed, one.grad)
    (table,), reference = tables_of(parted), whole.experts.table
    assert isinstance(reference, NeuronTable) and reference.rows.grad is not None
    rows = table.local.rows.grad
    close(rows, piece(table, rank, reference.rows.grad))
    if gradient == "compact" and by == "columns":
        ids = whole.indices(x).unique()
        first, last = table.pieces[rank].experts
        assert rows.is_sparse and rows.sparse_dim() == 1  # autograd drops the mark that it is coalesced; the ids tell
        assert rows._indices()[0].tolist() == [i - first for i in ids.tolist() if first <= i < last]  # only these
    if bias and (by == "rows" or rank == 0):
        assert reference.bias is not None and table.local.bias is not None
        first, last = table.pieces[rank].experts
        close(table.local.bias.grad, reference.bias.grad[first:last])
    with torch.no_grad():
        close(parted(own_x), own(expected, counts, rank))


def averaged(group: object) -> None:
    """With `average` a shard's gradient is what DDP makes of the others: the mean over processes."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    for by in ("columns", "rows"):
        for gradient in ("dense", "compact"):
            grads = []
            for average in (False, True):
                parted = shard(layer(2, True, gradient), group, by=by, average=average)  # type: ignore[arg-type]
                parted(own(tokens(COUNTS)[0], COUNTS, rank)).square().sum().backward()
                grads.append([p.grad for p in sharded_parameters(parted)])
            for one, other in zip(*grads):
                close(other, (one.to_dense() if one.is_sparse else one) / world)


def brought_together(group: object) -> None:
    """Unsharded, or gathered into a state dict, the model is what it was; a table that two layers share stays one."""
    for by in ("columns", "rows"):
        pair = nn.ModuleList([layer(3, True), layer(3, False)])
        pair[1].experts.table = pair[0].experts.table
        pair[0].experts.table.frozen = torch.arange(35) % 3 == 0
        before = {name: tensor.clone() for name, tensor in pair.state_dict().items()}
        shard(pair, group, by=by)  # type: ignore[arg-type]
        assert len(tables_of(pair)) == 1 and pair[0].experts.table is pair[1].experts.table
        gathered = gathered_state(pair)
        assert gathered.keys() == before.keys() and all(torch.equal(gathered[name], before[name]) for name in before)
        unshard(pair)
        assert pair[0].experts.table is pair[1].experts.table and isinstance(pair[0].experts.table, NeuronTable)
        after = pair.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    groups = {size: dist.new_group(list(range(size))) for size in (2, 3, 4)}
    for size, group in groups.items():
        if rank >= size:
            continue
        for by in ("columns", "rows"):
            equal_to_one(by, parts=2, bias=False, gradient="compact", counts=COUNTS[:size], group=group)
            equal_to_one(by, parts=3, bias=True, gradient="dense", counts=COUNTS[:size], group=group)
        equal_to_one("columns", parts=2, bias=True, gradient="auto", counts=(0,) * (size - 1) + (1,), group=group)
        equal_to_one("rows", parts=1, bias=False, gradient="auto", counts=(0,) * (size - 1) + (1,), group=group)
    averaged(groups[4])
    brought_together(groups[4])
    if rank == 0:
        print("checked")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
