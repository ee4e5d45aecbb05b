"""What the processes of a group send to one another, differentiable; each may bring another number of tokens, or none.

Every function here is one `torch.distributed.all_to_all_single` of uneven pieces, whose gradient is the same call with
the pieces turned round. A sum over processes is taken by its receiver in the order of the ranks, so it is the same on
every run. All processes of the group must make the same calls in the same order, backward passes included.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.autograd import Function


@dataclass(frozen=True)
class GroupTokens:
    """The tokens of all processes of a group, one process after the other."""

    counts: tuple[int, ...]
    """Tokens of each process, by rank in the group."""
    rank: int
    group: dist.ProcessGroup | None

    def all(self, x: Shaped[Tensor, " tokens *rest"]) -> Shaped[Tensor, " group_tokens *rest"]:
        """Everybody's values for their own tokens: an all-gather. The gradient is the sum of all processes'."""
        size = torch.Size(x.shape[1:]).numel()
        copies = x.reshape(1, -1).expand(len(self.counts), -1).reshape(-1)
        got = exchange(copies, [x.numel()] * len(self.counts), [count * size for count in self.counts], self.group)
        return got.view(sum(self.counts), *x.shape[1:])

    def sum_of_own(self, partial: Float[Tensor, " group_tokens *rest"]) -> Float[Tensor, " tokens *rest"]:
        """The sum over the processes of what each has for this process's tokens: a reduce-scatter."""
        own, size = self.counts[self.rank], torch.Size(partial.shape[1:]).numel()
        pieces = [count * size for count in self.counts]
        got = exchange(partial.reshape(-1), pieces, [own * size for _ in self.counts], self.group)
        return got.view(len(self.counts), own, *partial.shape[1:]).sum(0)

    def columns(
        self, x: Float[Tensor, "tokens width"], widths: Sequence[int]
    ) -> Float[Tensor, "group_tokens own_width"]:
        """Everybody's tokens, of each the columns that this process holds. `widths`: of each process, by rank."""
        mine = widths[self.rank]
        pieces = torch.cat([piece.reshape(-1) for piece in x.split(list(widths), 1)])
        got = exchange(
            pieces, [len(x) * width for width in widths], [count * mine for count in self.counts], self.group
        )
        return got.view(sum(self.counts), mine)

    def tokens(
        self, x: Float[Tensor, "group_tokens own_width"], widths: Sequence[int]
    ) -> Float[Tensor, "tokens width"]:
        """This process's tokens, with the columns of all: the way back of `columns`."""
        mine, own = widths[self.rank], self.counts[self.rank]
        sizes = [own * width for width in widths]
        got = exchange(x.reshape(-1), [count * mine for count in self.counts], sizes, self.group)
        return torch.cat([piece.view(own, width) for piece, width in zip(got.split(sizes), widths)], 1)


def group_tokens(own: int, group: dist.ProcessGroup | None, device: torch.device) -> GroupTokens:
    """How many tokens each process brings to this call. The one thing that waits for the device."""
    world = dist.get_world_size(group)
    ones = [1] * world
    counts = exchange(torch.full((world,), own, device=device), ones, ones, group)
    return GroupTokens(tuple(counts.tolist()), dist.get_rank(group), group)


def exchange(
    x: Shaped[Tensor, " sent"], send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup | None
) -> Shaped[Tensor, " received"]:
    """The first `send[0]` values go to rank 0 of the group, the next `send[1]` to rank 1; `receive[r]` come from r."""
    if x.is_floating_point():
        return _Exchange.apply(x, tuple(send), tuple(receive), group)  # type: ignore[no-any-return]
    return _all_to_all(x, send, receive, group)


def ranges(total: int, parts: int) -> tuple[tuple[int, int], ...]:
    """`total` cut into `parts` ranges (start, end) as even as whole numbers allow, the longer ones first."""
    sizes = [total // parts + (part < total % parts) for part in range(parts)]
    ends = list(accumulate(sizes))
    return tuple(zip([0, *ends[:-1]], ends))


def _all_to_all(x: Tensor, send: Sequence[int], receive: Sequence[int], group: Any) -> Tensor:
    got = x.new_empty(sum(receive))
    dist.all_to_all_single(got, x.contiguous(), list(receive), list(send), group=group)
    return got


class _Exchange(Function):
    """An all-to-all of uneven pieces; what is sent where turns round in the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, send: tuple[int, ...], receive: tuple[int, ...], group: Any) -> Tensor:  # type: ignore[override]
        ctx.way = send, receive, group
        return _all_to_all(x, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        send, receive, group = ctx.way
        return _Exchange.apply(gradients[0], receive, send, group), None, None, None  # type: ignore[return-value]
