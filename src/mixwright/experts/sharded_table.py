"""Tables spread over the processes of a group: by columns, each expert cut into slices, or by rows, each expert whole.

Every process brings its own tokens, as many as it likes, and gets their outputs. All of them make the same calls in the
same order, backward passes too: a process without tokens calls with none. A table's gradients are already summed over
the tokens of the whole group: they must not be summed or averaged over it again (see `sharding.shard`).
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from mixwright.experts.table import AbstractTable, NeuronTable
from mixwright.ops.exchange import GroupTokens, group_tokens, ranges
from mixwright.ops.neuron import Activation, activate
from mixwright.ops.row_products import row_dots, row_sums, take_rows

_NARROW = 1 << 31  # experts whose ids, and their complements, are four bytes


class Piece(NamedTuple):
    """What a process holds of a table: a range of experts and one of columns, (start, end) each."""

    experts: tuple[int, int]
    columns: tuple[int, int]


class AbstractShardedTable(AbstractTable):
    """`local`: what this process holds; optimisers find it there as any other table. `pieces`: of each, by rank."""

    local: NeuronTable
    group: dist.ProcessGroup | None
    pieces: tuple[Piece, ...]
    collective = True

    def take(
        self, ids: Int[Tensor, " ids"]
    ) -> tuple[Float[Tensor, "ids parts width"], Float[Tensor, "ids inputs"] | None]:
        """Not here: no process has all of it, and a look at one row must not wait for the others."""
        raise ValueError(
            f"the rows lie on {dist.get_world_size(self.group)} processes; look at them after unshard(model), or in a "
            "model loaded on one process."
        )

    def _everybodys_ids(self, tokens: GroupTokens, weights: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Everybody's ids, and which of them act: have a weight that is not 0, which the sign of what is sent says."""
        narrow = torch.int32 if self.num_experts <= _NARROW else torch.int64
        sent = indices.to(narrow)
        got = tokens.all(torch.where(weights == 0, ~sent, sent)).long()
        return torch.where(got < 0, ~got, got), got >= 0


class ColumnTable(AbstractShardedTable):
    """y[c] = sum_k w_k act(sum_r <u_k[c_r], x[c_r]>) v_k[c]: each process holds all experts, of each its columns c_r.

    Berges et al. 2024, arXiv 2412.09764, section 3.2, and one thing more, because a neuron has a dot before its
    nonlinearity: the partial dots are summed where the token is from, and what the neurons say is sent back.
    Use is balanced whatever is retrieved. Biases stand with the columns of the first process.
    """

    def __init__(self, local: NeuronTable, width: int, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.local, self.group = local, group
        self.num_experts, self.parts, self.width = local.num_experts, local.parts, width
        rank, parts = dist.get_rank(group), dist.get_world_size(group)
        self.pieces = tuple(Piece((0, self.num_experts), columns) for columns in ranges(width, parts))
        start, end = self.pieces[rank].columns
        if local.width != end - start:
            raise ValueError(
                f"process {rank} of {parts} brings {local.width} columns of a table of width {width}; its columns are "
                f"{start} to {end - 1}."
            )

    def forward(
        self,
        x: Float[Tensor, "tokens width"],
        weights: Float[Tensor, "tokens k"],
        indices: Int[Tensor, "tokens k"],
        activation: Activation,
    ) -> Float[Tensor, "tokens width"]:
        """sum_k w_k e_{indices_k}(x) for this process's tokens."""
        widths = [end - start for _, (start, end) in self.pieces]
        tokens = group_tokens(len(x), self.group, x.device)
        ids, acting = self._everybodys_ids(tokens, weights, indices)
        rows, places = self._rows(ids, acting)
        wide = torch.promote_types(x.dtype, torch.float32)
        hidden = weights.to(wide)
        if self.parts > 1:
            some = tokens.columns(x, widths).to(wide)
            partial = torch.stack([row_dots(some, *part) for part in zip(rows[:-1], places[:-1])], -1)
            bias, frozen = self.local.bias, self.local.frozen
            if bias is not None:
                free = bias if frozen is None else torch.where(frozen[:, None], bias.detach(), bias)
                partial = partial + free[ids].to(partial.dtype)
            hidden = activate(tokens.sum_of_own(partial), activation) * hidden
        found = row_sums(tokens.all(hidden), rows[-1], places[-1])
        return tokens.tokens(found.to(x.dtype), widths)

    def _rows(self, ids: Tensor, acting: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """For each part, rows and where in them the ids are; copies of the retrieved ones alone where they learn."""
        for read in self.local.before_read:
            read(ids)
        rows = self.local.rows
        if not (torch.is_grad_enabled() and rows.requires_grad):
            return (rows.flatten(0, 1),) * self.parts, [ids * self.parts + part for part in range(self.parts)]
        unique, there = ids.unique(return_inverse=True)
        learning = torch.zeros_like(unique, dtype=torch.bool)
        learning[there[acting]] = True
        if self.local.frozen is not None:
            learning &= ~self.local.frozen[unique]
        half = 2 * int(learning.sum()) < self.num_experts
        compact = self.local.gradient == "compact" or (self.local.gradient == "auto" and half)
        return take_rows(rows, unique, learning, compact=compact), [there] * self.parts


class RowTable(AbstractShardedTable):
    """Each process holds a range of experts, whole, and does their part for everybody's tokens (expert parallel).

    More is sent than by columns, and the work is as uneven as the use; but experts may be added on one process alone.
    """

    def __init__(self, local: NeuronTable, num_experts: int, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.local, self.group = local, group
        self.num_experts, self.parts, self.width = num_experts, local.parts, local.width
        rank, parts = dist.get_rank(group), dist.get_world_size(group)
        self.pieces = tuple(Piece(experts, (0, self.width)) for experts in ranges(num_experts, parts))
        self.start, self.end = self.pieces[rank].experts
        if local.num_experts != self.end - self.start:
            raise ValueError(
                f"process {rank} of {parts} brings {local.num_experts} experts of a table of {num_experts}; its "
                f"experts are {self.start} to {self.end - 1}."
            )

    def forward(
        self,
        x: Float[Tensor, "tokens width"],
        weights: Float[Tensor, "tokens k"],
        indices: Int[Tensor, "tokens k"],
        activation: Activation,
    ) -> Float[Tensor, "tokens width"]:
        """sum_k w_k e_{indices_k}(x) for this process's tokens."""
        tokens = group_tokens(len(x), self.group, x.device)
        ids, _ = self._everybodys_ids(tokens, weights, indices)
        everybody = tokens.all(x) if self.parts > 1 else x.new_zeros(1, 1).expand(len(ids), self.width)
        gates = tokens.all(weights)
        here = (ids >= self.start) & (ids < self.end)
        busy = here.any(1).nonzero()[:, 0]
        ids, gates, here = _first(ids[busy] - self.start, gates[busy], here[busy])
        found = self.local(everybody[busy], gates, ids, activation)
        wide = found.to(torch.promote_types(x.dtype, torch.float32))
        partial = wide.new_zeros(everybody.shape).index_copy(0, busy, wide)
        return tokens.sum_of_own(partial).to(x.dtype)


def _first(ids: Tensor, gates: Tensor, here: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs that are `here` first, and as many columns as the fullest token needs.

    The rest repeat the token's first expert with the weight zero, so that no expert is read that was not retrieved.
    """
    most = max(1, int(here.sum(1).max())) if len(here) else 1
    order = here.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    ids, gates, here = (t.gather(1, order) for t in (ids, gates, here))
    return torch.where(here, ids, ids[:, :1]), gates * here, here
