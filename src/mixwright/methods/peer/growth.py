"""Growth: experts added to a layer that has learned, while it goes on giving the same answers.

New sub-keys stand behind the old ones on the first axis, so that every id stays valid and rows are appended. They are
kept out by a selection bias of -inf: until they are let in outputs are the same to the bit. Rows out of zero alone
would not do: under a softmax the newcomers would take gates from the others. They are let in by raising the bias
(`admit`), or into slots of their own behind a gate of zero (`reserve_slots`), which changes nothing at once.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from mixwright.experts.base import AbstractExperts
from mixwright.experts.neuron import NeuronExperts
from mixwright.experts.table import NeuronTable
from mixwright.routers.base import AbstractRouter
from mixwright.routers.product_key import ProductKeyRouter

LEARNS = ("*router.keys_first", "*router.extra_gate", "*experts.table.rows")
"""Globs for a stage's groups: what learns after `freeze_present`."""
_TAG_WORDS = 3
DEEP = 4.0


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a row came from: the `step` at which it was added, and a word about its `source`."""

    step: int
    source: str


@torch.no_grad()
def grow(
    router: AbstractRouter,
    experts: AbstractExperts,
    sub_keys: int,
    *,
    source: str = "",
    step: int = 0,
    zero_out: bool = True,
    seed: int = 0,
    optimizers: Sequence[torch.optim.Optimizer] = (),
) -> range:
    """Add `sub_keys` times n2 experts, kept out until they are admitted; returns their ids.

    Sub-keys and rows in are drawn in the sizes of the present ones, rows out are zero unless `zero_out` is false.
    `source`, up to 24 bytes, and `step` are kept for `origins`. The parameters stay the same objects; `optimizers` that
    already have state for them must be given, so that it grows along (row optimisers of ours see it for rows by
    themselves). A table that several layers share grows with the first of them, and the others follow. Raises
    ValueError for layers that can't grow, before anything is changed.
    """
    plain, neurons, table = _parts(router, experts)
    if sub_keys < 1:
        raise ValueError(f"sub_keys={sub_keys}; expected at least 1, each of which is {plain.grid[1]} experts.")
    if plain.extra is not None:
        raise ValueError("experts in slots of their own are still there; only what is admitted can stay behind growth.")
    tag, present, n2 = _encoded(source), plain.num_experts, plain.grid[1]
    if table.num_experts not in (present, present + sub_keys * n2):
        raise ValueError(
            f"the table has {table.num_experts} rows and the router {present}; layers that share it grow by the same "
            "number of sub-keys."
        )
    table.catch_up()
    draw = torch.Generator().manual_seed(seed)
    before = {id(p): p.shape for p in (plain.keys_first, table.rows, table.bias) if p is not None}
    started = _started(optimizers, (plain.keys_first, table.rows, table.bias))
    plain.widen(_like(plain.keys_first, 1, sub_keys, draw))
    if table.num_experts == present:
        rows = torch.cat([_like(table.rows[:, [part]], 0, sub_keys * n2, draw) for part in range(table.parts)], 1)
        if zero_out:
            rows[:, -1] = 0
        table.append(rows)
        born = torch.tensor([[present, step, *tag]], dtype=torch.long, device=table.rows.device)
        table.provenance = born if table.provenance is None else torch.cat([table.provenance, born])
    _extend(started, before)
    if neurons.grown is None:
        neurons.grown = torch.tensor([present, plain.heads, 0])
    return range(present, plain.num_experts)


@torch.no_grad()
def admit(router: AbstractRouter, experts: AbstractExperts, progress: float = 1.0, depth: float | None = None) -> None:
    """Let the newest experts in: the bias of their sub-keys is -depth (1 - progress), -inf at 0.

    At 1 they are like the others. `depth` is by default four times the length of a sub-key, about four deviations of
    what standardised queries score; raise `progress` step by step in training. Raises ValueError where nobody waits.
    """
    plain, neurons, _ = _parts(router, experts)
    start = _waiting(plain, neurons)
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress={progress}; accepted is a share from 0 (kept out) to 1 (like the others).")
    if depth is None:
        depth = DEEP * float(plain.keys_first[:, :start].float().square().sum(-1).mean().sqrt())
    plain.bias_first[:, start:] = -math.inf if progress == 0 else -depth * (1 - progress)
    if progress == 1:
        neurons.grown = None


@torch.no_grad()
def reserve_slots(router: AbstractRouter, experts: AbstractExperts, slots: int, *, seed: int = 0) -> None:
    """Let the newest experts in beside the others: `slots` more per head, with gates among themselves, times a learned
    factor per head that starts at zero. Outputs stay the same to the bit until it moves.

    Rows out of zero are drawn anew, in the size of the present ones: of a factor and a row of zero neither would learn.
    """
    plain, neurons, table = _parts(router, experts)
    start = _waiting(plain, neurons)
    new = (plain.grid[0] - start) * plain.grid[1]
    if not 1 <= slots <= new:
        raise ValueError(f"slots={slots}; expected 1 to {new}, the experts that were added.")
    first = start * plain.grid[1]
    if not bool(table.rows[first:, -1].any()):
        drawn = _like(table.rows[:first, [-1]], 0, new, torch.Generator().manual_seed(seed))
        table.rows[first:, -1] = drawn[:, 0].to(table.rows)
    plain.bias_first[:, start:] = 0.0
    plain.extra = torch.tensor([start, slots])
    plain.extra_gate = nn.Parameter(plain.keys_first.new_zeros(plain.heads))
    neurons.grown = torch.tensor([first, plain.heads, slots])


@torch.no_grad()
def freeze_present(router: AbstractRouter, experts: AbstractExperts) -> None:
    """Only what waits, or has slots of its own, learns from here on: the older rows and sub-keys get no gradient, the
    query network, its norm with its statistics, the other axis and the projections are switched off.

    Rows and sub-keys then stay the same to the bit under optimisers of ours, and under others that neither decay
    weights nor carry momentum from before. `router.norm.frozen` is not saved; freeze again after loading.
    """
    plain, neurons, table = _parts(router, experts)
    start = _waiting(plain, neurons)
    table.catch_up()
    frozen = torch.arange(table.num_experts, device=table.rows.device) < start * plain.grid[1]
    table.frozen = frozen if table.frozen is None else frozen | table.frozen
    plain.frozen_first, plain.norm.frozen = start, True
    for module in (plain, neurons):
        for name, parameter in module.named_parameters():
            if name not in ("keys_first", "extra_gate", "table.rows", "table.bias"):
                parameter.requires_grad_(False)


@torch.no_grad()
def open_rows(experts: AbstractExperts, used_now: Tensor, used_before: Tensor, top: int) -> Int[Tensor, " ids"]:
    """Sparse editing: only the `top` rows that matter most to new data, and least to what came before, may learn.

    The order is TF-IDF of their use: count now / all now * log((1 + all before) / (1 + count before)). Both counts are
    `(experts,)`; see `evaluation/neuron_usage.py`. Returns the ids; every other row is frozen.
    """
    neurons = _neurons(experts)
    table = _table(neurons)
    for name, counts in (("used_now", used_now), ("used_before", used_before)):
        if counts.shape != (table.num_experts,):
            raise ValueError(f"{name} has shape {tuple(counts.shape)}; expected ({table.num_experts},), one per row.")
    now, before = used_now.double(), used_before.double()
    weight = now / now.sum().clamp_min(1) * torch.log((1 + before.sum()) / (1 + before))
    used = int((now > 0).sum())
    if not 1 <= top <= used:
        raise ValueError(f"top={top}; expected 1 to {used}, the rows that the new data used.")
    table.catch_up()
    ids = weight.argsort(descending=True, stable=True)[:top].to(table.rows.device)
    table.frozen = torch.ones(table.num_experts, dtype=torch.bool, device=table.rows.device)
    table.frozen[ids] = False
    return ids


def origins(experts: AbstractExperts, ids: Iterable[int]) -> list[Origin]:
    """Where these rows came from; the first ones at step 0, from nowhere."""
    table = _table(_neurons(experts))
    blocks = [] if table.provenance is None else table.provenance.tolist()
    found: list[Origin] = []
    for index in ids:
        block = next((block for block in reversed(blocks) if block[0] <= index), [0, 0, *[0] * _TAG_WORDS])
        found.append(Origin(step=block[1], source=_decoded(block[2:])))
    return found


def _parts(router: AbstractRouter, experts: AbstractExperts) -> tuple[ProductKeyRouter, NeuronExperts, NeuronTable]:
    """The plain router, neurons and rows inside of whatever is wrapped around them."""
    plain: nn.Module | None = router
    while not isinstance(plain, ProductKeyRouter):
        plain = getattr(plain, "router", None)
        if plain is None:
            raise ValueError(f"a {type(router).__name__} does not retrieve by product keys and can't grow.")
    if plain.separate_heads:
        raise ValueError("separate_heads: ids of one head stand before those of the next, so nothing can be appended.")
    neurons = _neurons(experts)
    return plain, neurons, _table(neurons)


def _neurons(experts: AbstractExperts) -> NeuronExperts:
    inner: nn.Module | None = experts
    while not isinstance(inner, NeuronExperts):
        inner = getattr(inner, "experts", None)
        if inner is None:
            raise ValueError(f"{type(experts).__name__} are no neurons in a table.")
    return inner


def _table(neurons: NeuronExperts) -> NeuronTable:
    if not isinstance(neurons.table, NeuronTable):
        raise ValueError(f"a {type(neurons.table).__name__} takes no more rows; grow the table in memory it came from.")
    return neurons.table


def _waiting(router: ProductKeyRouter, neurons: NeuronExperts) -> int:
    """The first sub-key of those that were added last."""
    if neurons.grown is None:
        raise ValueError("no experts wait to be let in; grow the layer first.")
    return int(neurons.grown[0]) // router.grid[1]


def _like(present: Tensor, axis: int, count: int, draw: torch.Generator) -> Tensor:
    """`count` more along an axis, normal, of the deviation of what is there."""
    shape = [count if i == axis else size for i, size in enumerate(present.shape)]
    size = float(present.detach().float().square().mean().sqrt())
    return torch.randn(shape, generator=draw) * size


def _started(
    optimizers: Sequence[torch.optim.Optimizer], parameters: Iterable[nn.Parameter | None]
) -> list[tuple[nn.Parameter, dict[str, Tensor]]]:
    """The state that optimisers hold for these parameters. Raises ValueError for one that steps on none of them."""
    wanted = [p for p in parameters if p is not None]
    for optimizer in optimizers:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in held for p in wanted):
            raise ValueError(f"{type(optimizer).__name__} holds no parameter of this layer that grows.")
    return [(p, optimizer.state[p]) for optimizer in optimizers for p in wanted if p in optimizer.state]


def _extend(started: list[tuple[nn.Parameter, dict[str, Tensor]]], before: dict[int, torch.Size]) -> None:
    """Zeros for what is new, in every state that has an entry for each entry or each row of its parameter."""
    for parameter, state in started:
        old, new = before[id(parameter)], parameter.shape
        axis = next((i for i, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1]), None)
        if "last" in state:  # a row optimiser of ours, which extends its own
            continue
        for name, value in state.items():
            if axis is None or not isinstance(value, Tensor) or value.dim() <= axis or value.shape[axis] != old[axis]:  # pyright: ignore[reportUnnecessaryIsInstance]
                continue
            more = [new[axis] - old[axis] if i == axis else size for i, size in enumerate(value.shape)]
            state[name] = torch.cat([value, value.new_zeros(more)], axis)


def _encoded(source: str) -> list[int]:
    text = source.encode()
    if len(text) > 8 * _TAG_WORDS:
        raise ValueError(f"source={source!r} has {len(text)} bytes; at most {8 * _TAG_WORDS} are kept.")
    padded = text.ljust(8 * _TAG_WORDS, b"\0")
    return [int.from_bytes(padded[i : i + 8], "big", signed=True) for i in range(0, len(padded), 8)]


def _decoded(words: Sequence[int]) -> str:
    return b"".join(word.to_bytes(8, "big", signed=True) for word in words).rstrip(b"\0").decode()
