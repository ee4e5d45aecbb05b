"""Run under torchrun with four processes, which also form groups of two and three: sharded tables against one."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mixwright.errors import CatalogError
from mixwright.experts.neuron import NeuronExperts
from mixwright.experts.sharded_table import AbstractShardedTable
from mixwright.experts.sharding import gathered_state, shard, sharded_parameters, tables_of, unshard
from mixwright.experts.table import NeuronTable
from mixwright.experts.table_shards import load_tables, save_tables
from mixwright.methods.peer.layer import PEER
from mixwright.ops.wire import wire_bytes
from mixwright.routing import Condition, Routing
from mixwright.training.row_optimizers import LazyAdamW

WIDTH, COUNTS = 10, (3, 0, 5, 2)


class Layer(nn.Module):
    """Neurons chosen and weighed by projections of the token: 6 of 35, some by two tokens, some by none."""

    def __init__(self, parts: int, bias: bool, gradient: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router, self.chosen = nn.Linear(WIDTH, 6, bias=False), torch.randn(WIDTH, 35).double()
        table = NeuronTable(torch.randn(35, parts, WIDTH), torch.randn(35, parts - 1) if bias else None)
        table.gradient = gradient  # type: ignore[assignment]
        table.frozen = torch.arange(35) % 4 == 1 if bias else None
        self.experts = NeuronExperts(table, "gelu")
        self.double()

    def indices(self, x: Tensor) -> Tensor:
        return (x.detach() @ self.chosen).topk(6).indices

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1) * torch.tensor([1.0, 1, 0, 1, 1, 1])  # the third does not act
        return self.experts(x, Routing(weights, 35, self.indices(x)), Condition())


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
    rank = dist.get_rank(group)
    x, direction = tokens(counts)
    whole, parted = layer(parts, bias), shard(layer(parts, bias, gradient), group, by=by)  # type: ignore[arg-type]
    all_x, own_x = x.clone().requires_grad_(), own(x, counts, rank).clone().requires_grad_()
    expected, found = whole(all_x), parted(own_x)
    close(found, own(expected, counts, rank))
    (expected * direction).sum().backward()
    (found * own(direction, counts, rank)).sum().backward()
    close(own_x.grad, None if all_x.grad is None else own(all_x.grad, counts, rank))
    for (name, one), (other, mine) in zip(whole.router.named_parameters(), parted.router.named_parameters()):
        assert name == other
        summed = torch.zeros_like(mine) if mine.grad is None else mine.grad.clone()
        dist.all_reduce(summed, group=group)
        close(summed, one.grad)
    (table,), reference = tables_of(parted), whole.experts.table
    assert isinstance(reference, NeuronTable) and reference.rows.grad is not None
    rows = table.local.rows.grad
    close(rows, piece(table, rank, reference.rows.grad))
    if gradient == "compact":
        ids = whole.indices(x)[:, [0, 1, 3, 4, 5]].unique()
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


class Counted:
    """What collectives send to other processes while the block runs; any but the all-to-all is an error."""

    def __init__(self, group: object) -> None:
        self.group, self.bytes, self.calls = group, 0, 0

    def __enter__(self) -> "Counted":
        self.kept = {name: getattr(dist, name) for name in (*REFUSED, "all_to_all_single") if hasattr(dist, name)}
        rank, plain = dist.get_rank(self.group), dist.all_to_all_single

        def all_to_all(out: Tensor, sent: Tensor, receive: list[int], send: list[int], group: object) -> object:
            assert sent.numel() == sum(send) and group is self.group
            self.bytes += (sent.numel() - send[rank]) * sent.element_size()
            self.calls += 1
            return plain(out, sent, receive, send, group=group)

        def refused(*arguments: object, **named: object) -> None:
            raise AssertionError("another collective")

        for name in self.kept:
            setattr(dist, name, refused)
        dist.all_to_all_single = all_to_all
        return self

    def __exit__(self, *error: object) -> None:
        for name, plain in self.kept.items():
            setattr(dist, name, plain)


REFUSED = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor", "all_to_all",
    "all_gather_single", "broadcast", "send", "isend", "gather", "scatter", "reduce",
    "all_gather_object", "broadcast_object_list",
)  # fmt: skip


def sent_as_computed(group: object) -> None:
    """What is sent is what `wire_bytes` says, and does not depend on the number of experts."""
    world, k, width, each = dist.get_world_size(group), 6, 12, 3
    for by in ("columns", "rows"):
        for parts in (1, 2, 3):
            sent = []
            for count in (40, 4000):
                torch.manual_seed(0)
                table = shard(NeuronTable(torch.randn(count, parts, width)), group, by=by)  # type: ignore[arg-type]
                x = torch.randn(each, width).bfloat16().requires_grad_()
                weights, indices = torch.rand(each, k).requires_grad_(), torch.randint(count, (each, k))
                with Counted(group) as forth:
                    y = table(x, weights, indices, "gelu")
                with Counted(group) as back:
                    y.float().sum().backward()
                found = torch.tensor([forth.bytes, back.bytes])
                dist.all_reduce(found, group=group)
                there = {"num_experts": count, "width": width, "k": k, "parts": parts, "processes": world}
                forward, backward = (
                    round(each * world * sum(wire_bytes(by, **there, backward=way).values()))  # type: ignore[arg-type]
                    for way in (False, True)
                )
                assert found.tolist() == [forward + 8 * world * (world - 1), backward], (by, parts, found)
                sent.append(found.tolist())
            assert sent[0] == sent[1]


def by_peer(group: object) -> None:
    """A PEER layer with batch norm over the tokens of all processes, in training; without, evaluated in pieces."""
    rank = dist.get_rank(group)
    x, direction = torch.randn(2, 10, 12, generator=torch.Generator().manual_seed(4)).double()
    for by in ("columns", "rows"):
        for norm in ("batch", "layer"):
            torch.manual_seed(3)
            whole = PEER(12, (6, 8), heads=2, top_k=3, dim_key=8, gated=True, query_norm=norm).double()  # type: ignore[arg-type]
            parted = shard(copy.deepcopy(whole), group, by=by)  # type: ignore[arg-type]
            if norm == "layer":
                with torch.no_grad():
                    close(parted.eval()(own(x, COUNTS, rank)), own(whole.eval()(x), COUNTS, rank))
                continue
            found = parted(own(x, COUNTS, rank))
            (found * own(direction, COUNTS, rank)).sum().backward()
            with Alone():
                expected = whole(x)
                (expected * direction).sum().backward()
            close(found, own(expected, COUNTS, rank))
            for one, mine in zip(whole.router.parameters(), parted.router.parameters()):
                summed = torch.zeros_like(mine) if mine.grad is None else mine.grad.clone()
                dist.all_reduce(summed, group=group)
                close(summed, one.grad)


class Alone:
    """Inside the block this process believes that there is no other."""

    def __enter__(self) -> None:
        self.kept, dist.is_initialized = dist.is_initialized, lambda: False

    def __exit__(self, *error: object) -> None:
        dist.is_initialized = self.kept


def trained(group: object) -> None:
    """Six steps of LazyAdamW on shards are six steps on the whole table; its rows are caught up for everybody's ids."""
    rank, counts = dist.get_rank(group), (1, 0, 2, 1)
    for by in ("columns", "rows"):
        whole, parted = layer(2, True, "compact"), shard(layer(2, True, "compact"), group, by=by)  # type: ignore[arg-type]
        ends = []
        for model, mine in ((whole, False), (parted, True)):
            optimizer = LazyAdamW(model, lr=0.03, weight_decay=0.1)
            for step in range(6):
                x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step)).double()
                model(own(x, counts, rank) if mine else x).square().sum().backward()
                if mine:
                    for parameter in model.router.parameters():
                        dist.all_reduce(parameter.grad, group=group)
                optimizer.step()
                optimizer.zero_grad()
            optimizer.flush()
            ends.append(gathered_state(model))
        assert ends[0].keys() == ends[1].keys()
        for name, tensor in ends[0].items():
            close(ends[1][name], tensor)


def saved(folder: Path, groups: dict[int, object]) -> None:
    """Saved on four, by rows and columns, loaded on two the other way round; saved on one, loaded on three."""
    rank = dist.get_rank()
    model = nn.ModuleList([layer(3, True), layer(2)])
    model[0].experts.table.frozen = torch.arange(35) % 5 == 0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for by in ("columns", "rows"):
        save_tables(shard(copy.deepcopy(model), groups[4], by=by), folder / by)  # type: ignore[arg-type]
    try:
        save_tables(shard(copy.deepcopy(model), groups[4]), folder / "columns")
        raise SystemError("a folder in use was taken")
    except CatalogError as error:
        assert error.code == ("PATH" if rank == 0 else "INCOMPLETE")
    for size, source in ((2, "columns"), (2, "rows"), (3, "one")):
        for by in ("columns", "rows"):
            if rank < size:
                loaded = shard(copy.deepcopy(model), groups[size], by=by)  # type: ignore[arg-type]
                with torch.no_grad():
                    for parameter in sharded_parameters(loaded):
                        parameter.zero_()
                load_tables(loaded, folder / source)
                state = gathered_state(loaded)
                assert all(torch.equal(state[name], before[name]) for name in before)


def beside_fsdp(group: object) -> None:
    """Everything but the table is FSDP's; what it gathers is no table; the control's is."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    mesh = DeviceMesh.from_group(group, "cpu")  # type: ignore[arg-type]
    x, direction = tokens((4, 5))
    whole = layer(2)
    (whole(x) * direction).sum().backward()
    largest: dict[bool, int] = {}
    for ignored in (False, True):
        model = shard(layer(2, gradient="compact"), group, average=True)
        keep = set(sharded_parameters(model)) if ignored else set()
        fully_shard(model, mesh=mesh, ignored_params=keep)
        if not ignored:
            with Gathered() as gathered:
                model.unshard()
            largest[ignored] = gathered.largest
            continue
        assert not any(isinstance(p, DTensor) for p in sharded_parameters(model))
        assert isinstance(model.router.weight, DTensor)
        with Gathered() as gathered:
            found = model(own(x, (4, 5), rank)).clone()
        largest[ignored] = gathered.largest
        close(found, own(whole(x), (4, 5), rank))
        (found * own(direction, (4, 5), rank)).sum().backward()
        (table,) = tables_of(model)
        assert table.local.rows.grad is not None and table.local.rows.grad.is_sparse
        close(table.local.rows.grad, piece(table, rank, whole.experts.table.rows.grad) / world)
        close(model.router.weight.grad.full_tensor(), whole.router.weight.grad / world)
    assert largest[True] == 6 * WIDTH < 35 * 2 * WIDTH // world < largest[False], largest


class Gathered:
    """The most values that an all-gather brought while the block ran."""

    def __enter__(self) -> "Gathered":
        self.largest = 0
        self.kept = {name: getattr(dist, name) for name in GATHERS if hasattr(dist, name)}
        for name, plain in self.kept.items():
            setattr(dist, name, self.counting(plain))
        return self

    def counting(self, plain: Callable) -> Callable:
        def count(out: Tensor, *arguments: object, **named: object) -> object:
            self.largest = max(self.largest, out.numel())
            return plain(out, *arguments, **named)

        return count

    def __exit__(self, *error: object) -> None:
        for name, plain in self.kept.items():
            setattr(dist, name, plain)


GATHERS = ("all_gather_into_tensor", "all_gather_single")  # what FSDP calls, by torch's version


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    groups = {size: dist.new_group(list(range(size))) for size in (2, 3, 4)}
    checks = 0
    for size, group in groups.items():
        if rank >= size:
            continue
        for by in ("columns", "rows"):
            equal_to_one(by, parts=2, bias=False, gradient="compact", counts=COUNTS[:size], group=group)
            equal_to_one(by, parts=3, bias=True, gradient="dense", counts=COUNTS[:size], group=group)
            equal_to_one(by, 2 if by == "columns" else 1, False, "auto", (0,) * (size - 1) + (1,), group)
            checks += 3
        sent_as_computed(group)
    averaged(groups[4])
    brought_together(groups[4])
    by_peer(groups[4])
    trained(groups[4])
    saved(folder, groups)  # type: ignore[arg-type]
    if rank < 2:
        beside_fsdp(groups[2])
    dist.barrier()
    if rank == 0:
        print(f"{checks} comparisons")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
