"""Optimiser rules for some rows of a table, in place: whatever is not named by `ids` is neither read nor written.

Here they are in plain torch, on any device, in blocks of rows; this is the specification. `ops/row_kernels.py` takes
the compiled twin where there is one. A table lies flat, `(experts, numbers of an expert)`; `ids` are unique, and None
stands for every row. Rows in bfloat16 are computed in float32, as their state is, and rounded stochastically by `key`.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixwright.ops.missed_steps import Replay
from mixwright.ops.stochastic_rounding import round_stochastically

_BLOCK = 1 << 18
"""Numbers that are worked on at a time, so that temporaries stay in the cache."""


class AdamWStep(NamedTuple):
    """One step of AdamW for rows that have a gradient."""

    step: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def adamw_rows(
    rows: Float[Tensor, "experts row"],
    first: Float[Tensor, "experts row"],
    second: Float[Tensor, "experts row"],
    ids: Int[Tensor, " ids"] | None,
    gradient: Float[Tensor, "_ row"],
    rule: AdamWStep,
    key: int,
) -> None:
    """p <- (1 - lr wd) p - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps), with m and v moved on by the gradient."""
    size = rule.lr / (1 - rule.beta1**rule.step)
    root = (1 - rule.beta2**rule.step) ** 0.5
    for take, put, at in _blocks(rows, ids, key):
        g = gradient[at].to(first.dtype)
        m = take(first).lerp_(g, 1 - rule.beta1)
        v = take(second).mul_(rule.beta2).addcmul_(g, g, value=1 - rule.beta2)
        p = take(rows).mul_(1 - rule.lr * rule.weight_decay)
        put(rows, p.addcdiv_(m, v.sqrt().div_(root).add_(rule.eps), value=-size))
        put(first, m)
        put(second, v)


def replay_rows(
    rows: Float[Tensor, "experts row"],
    first: Float[Tensor, "experts row"],
    second: Float[Tensor, "experts row"],
    ids: Int[Tensor, " ids"],
    which: Int[Tensor, " ids"],
    replay: Replay,
    eps: float,
    key: int,
) -> None:
    """The missed steps of AdamW; `which` of the replay's starting points each row stands at."""
    for take, put, at in _blocks(rows, ids, key):
        start = which[at]
        m, v = take(first), take(second)
        root, move = v.sqrt(), torch.zeros_like(v)
        for segment in range(replay.middles.shape[1]):
            scaled = eps * replay.middles[start, segment][:, None]
            inverse = 1 / (root + scaled)
            ratio = scaled * inverse
            sums = replay.sums[start, segment]
            total = sums[:, -1:].expand_as(ratio)
            for n in range(sums.shape[1] - 2, -1, -1):
                total = total * ratio + sums[:, n : n + 1]
            move += inverse * total
        put(rows, take(rows).mul_(replay.kept[start][:, None]).sub_(m * move))
        put(first, m.mul_(replay.first[start][:, None]))
        put(second, v.mul_(replay.second[start][:, None]))


def adagrad_rows(
    rows: Float[Tensor, "experts row"],
    sums: Float[Tensor, "experts parts"],
    ids: Int[Tensor, " ids"] | None,
    gradient: Float[Tensor, "_ row"],
    lr: float,
    eps: float,
    keep: float,
    key: int,
) -> None:
    """s <- s + mean(g^2), p <- keep p - lr g / (sqrt(s) + eps), for each part of each row."""
    parts = sums.shape[1]
    for take, put, at in _blocks(rows, ids, key):
        g = gradient[at].to(sums.dtype).unflatten(1, (parts, -1))
        s = take(sums).add_(g.square().mean(2))
        p = take(rows).mul_(keep).unflatten(1, (parts, -1))
        put(rows, p.addcdiv_(g, s.sqrt().add_(eps)[:, :, None], value=-lr).flatten(1))
        put(sums, s)


def decay_rows(
    rows: Float[Tensor, "experts row"], ids: Int[Tensor, " ids"], factors: Float[Tensor, " ids"], key: int
) -> None:
    """p <- f p, with a factor for each row."""
    for take, put, at in _blocks(rows, ids, key):
        p = take(rows)
        put(rows, p.mul_(factors[at].to(p.dtype)[:, None]))


def _blocks(
    rows: Tensor, ids: Tensor | None, key: int
) -> Iterator[tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], None], slice]]:
    """(a copy of the block's rows of a table, put them back, where the block lies in `ids`)."""
    count = len(rows) if ids is None else len(ids)
    each = max(1, _BLOCK // max(1, rows.shape[1]))
    for begin in range(0, count, each):
        at = slice(begin, min(begin + each, count))
        block = torch.arange(begin, at.stop, device=rows.device) if ids is None else ids[at]

        def take(table: Tensor, block: Tensor = block) -> Tensor:
            copied = table.index_select(0, block)
            return copied.float() if copied.dtype == torch.bfloat16 else copied

        def put(table: Tensor, values: Tensor, block: Tensor = block) -> None:
            if table.dtype == torch.bfloat16:
                values = round_stochastically(values, block, key)
            table.index_copy_(0, block, values)

        yield take, put, at
