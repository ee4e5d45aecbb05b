"""A model's tables spread over processes and brought together again.

Which gradients are averaged where, with P processes that each take their own share of a batch:

- What every process holds (queries, keys, norms, the rest of the model) is summed or averaged over all of them, by DDP,
  by FSDP or by the loop, as ever.
- A shard's gradient is already the sum over the group's tokens. Where the others are summed, leave it alone. Where they
  are averaged (DDP, FSDP), shard with `average=True`, which divides it by P as well. In either case keep it out:
  `fully_shard(model, ignored_params=set(sharded_parameters(model)))`, `_ddp_params_and_buffers_to_ignore`.
- With several groups that hold the same table, its gradient is summed (or averaged) over the processes that hold the
  same shard, one of each group.
- A norm over all parameters, for clipping, adds up the shards' squares over the group and counts the rest once.
- Row-wise Adagrad's mean square of a row is that of the columns held here; LazyAdamW has no such sum and is unchanged.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mixwright.experts.sharded_table import AbstractShardedTable, ColumnTable, RowTable
from mixwright.experts.table import AbstractTable, NeuronTable
from mixwright.ops.exchange import exchange, ranges

Model = TypeVar("Model", bound=nn.Module)
_BLOCK = 1 << 22  # numbers of each process gathered at a time
_KINDS = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8)


def shard(
    model: Model,
    group: dist.ProcessGroup | None = None,
    by: Literal["columns", "rows"] = "columns",
    *,
    average: bool = False,
) -> Model:
    """Keep of every table in `model` what this process holds. Every process of the group gives the same model.

    Do it before optimisers are made. `average`: divide the shards' gradients by the number of processes. Returns
    `model`, or for a table alone the one that takes its place.
    """
    parts, rank = dist.get_world_size(group), dist.get_rank(group)
    made: dict[NeuronTable, AbstractShardedTable] = {}
    for table in (module for module in list(model.modules()) if isinstance(module, NeuronTable)):
        made[table] = _cut(table, by, group, parts, rank)
        if average:
            for parameter in made[table].local.parameters():
                parameter.register_hook(partial(torch.mul, other=1 / parts))
    return _replace(model, made)


@torch.no_grad()
def unshard(model: Model) -> Model:
    """Every process gets its tables whole again; all processes of the group must call it. Returns `model`."""
    return _replace(model, {table: _whole(table) for table in tables_of(model)})


def tables_of(model: nn.Module) -> list[AbstractShardedTable]:
    """The sharded tables of a model, each once."""
    return [module for module in model.modules() if isinstance(module, AbstractShardedTable)]


def sharded_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What differs from process to process: nothing that gathers, averages or broadcasts parameters may touch it."""
    return [parameter for table in tables_of(model) for parameter in table.local.parameters()]


@torch.no_grad()
def gathered_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model as it was before it was sharded; all processes of the group must call it."""
    state = dict(model.state_dict())
    whole = {table: _whole(table).state_dict() for table in tables_of(model)}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, AbstractShardedTable):
            prefix = f"{path}." if path else ""
            state = {name: tensor for name, tensor in state.items() if not name.startswith(f"{prefix}local.")}
            state |= {f"{prefix}{name}": tensor for name, tensor in whole[module].items()}
    return state


def _cut(table: NeuronTable, by: str, group: dist.ProcessGroup | None, parts: int, rank: int) -> AbstractShardedTable:
    if table.before_read:
        raise ValueError("an optimiser already follows this table; shard the model first, then make its optimisers.")
    axis = {"columns": 2, "rows": 0}.get(by)
    if axis is None:
        raise ValueError(f"by={by!r}; a table is sharded by 'columns' or 'rows'.")
    start, end = ranges(table.rows.shape[axis], parts)[rank]
    if start == end:
        raise ValueError(f"{parts} processes for {table.rows.shape[axis]} {by}; each needs one at least.")
    rows, bias, frozen = table.rows.detach().narrow(axis, start, end - start).clone(), table.bias, table.frozen
    if by == "rows":
        bias = None if bias is None else bias.detach()[start:end].clone()
        frozen = None if frozen is None else frozen[start:end].clone()
    elif rank > 0:
        bias = None
    local = NeuronTable(rows, None if bias is None else bias.detach().clone())
    local.rows.requires_grad_(table.rows.requires_grad)
    local.gradient, local.frozen, local.provenance = table.gradient, frozen, table.provenance
    local.train(table.training)
    return ColumnTable(local, table.width, group) if by == "columns" else RowTable(local, table.num_experts, group)


def _whole(table: AbstractShardedTable) -> NeuronTable:
    local, group = table.local, table.group
    rows = local.rows.new_empty(table.num_experts, table.parts, table.width)
    shapes = [(last - first, table.parts, end - start) for (first, last), (start, end) in table.pieces]
    for at, blocks in _blocks(local.rows, shapes, group):
        for ((first, _), (start, end)), block in zip(table.pieces, blocks):
            rows[first + at : first + at + len(block), :, start:end] = block
    whole = NeuronTable(rows, _per_expert(table, local.bias, (table.parts - 1,)))
    whole.rows.requires_grad_(local.rows.requires_grad)
    frozen = None if local.frozen is None else local.frozen.to(torch.uint8)
    found = _per_expert(table, frozen, ())
    whole.gradient, whole.provenance = local.gradient, local.provenance
    whole.frozen = None if found is None else found.bool()
    return whole.train(table.training)


def _per_expert(table: AbstractShardedTable, held: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """A small tensor of all experts, by columns the first process's; None where that holds none."""
    device, world = table.local.rows.device, len(table.pieces)
    kind = torch.tensor(-1 if held is None else _KINDS.index(held.dtype), device=device)
    kinds = exchange(kind.repeat(world), [1] * world, [1] * world, table.group).tolist()
    if kinds[0] < 0:
        return None
    holders = [rank for rank, kind in enumerate(kinds) if kind >= 0 and (rank == 0 or table.pieces[rank].experts[0])]
    mine = torch.empty(0, *shape, dtype=_KINDS[kinds[0]], device=device)
    if held is not None and dist.get_rank(table.group) in holders:
        mine = held
    shapes = [(end - start if rank in holders else 0, *shape) for rank, ((start, end), _) in enumerate(table.pieces)]
    whole = mine.new_empty(table.num_experts, *shape)
    for at, blocks in _blocks(mine, shapes, table.group):
        for (experts, _), block in zip(table.pieces, blocks):
            whole[experts[0] + at : experts[0] + at + len(block)] = block
    return whole


def _blocks(
    mine: Tensor, shapes: Sequence[tuple[int, ...]], group: dist.ProcessGroup | None
) -> Iterator[tuple[int, list[Tensor]]]:
    """Everybody's tensors, some rows at a time: where the rows begin, and those of each process."""
    sizes = [torch.Size(shape[1:]).numel() for shape in shapes]
    step = max(1, _BLOCK // max(1, *sizes))
    for at in range(0, max(shape[0] for shape in shapes), step):
        some = mine[at : at + step].reshape(-1)
        counts = [max(0, min(step, shape[0] - at)) * size for shape, size in zip(shapes, sizes)]
        got = exchange(some.repeat(len(shapes)), [some.numel()] * len(shapes), counts, group)
        yield (
            at,
            [
                part.view(-1, *shape[1:]) if part.numel() else part.new_empty(0, *shape[1:])
                for part, shape in zip(got.split(counts), shapes)
            ],
        )


def _replace(model: Model, made: Mapping[Any, AbstractTable]) -> Model:
    """Put each new table wherever the old one was."""
    if model in made:
        return cast(Model, made[model])
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if child in made:
                setattr(module, name, made[child])
    return model
