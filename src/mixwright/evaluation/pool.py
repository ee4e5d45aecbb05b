"""What a pool of sparse experts changes: where each acts, how much they overlap, which tasks are mixed alike."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mixwright.composition.episodic import EpisodicModel
from mixwright.composition.measured_domains import MeasuredDomain, measured_in
from mixwright.evaluation.linkage import Merge, average_linkage, leaf_order
from mixwright.experts.base import key_of
from mixwright.experts.dense_deltas import DenseDeltas
from mixwright.experts.overlap import overlap
from mixwright.experts.sparse_deltas import SparseDeltas
from mixwright.routing import Routing

TOP = 20
OUTSIDE = "outside"
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class PoolCell:
    """The parameters of one kind at one depth: how many weights, and the share that each expert changes."""

    place: str
    kind: str
    weights: int
    density: tuple[float, ...]


@dataclass(frozen=True)
class PoolTensor:
    """A parameter: norm(c * delta) / norm(theta) under a mixture, and the share of its weights that moves.

    One that was pretrained at zero has no such ratio and is left out.
    """

    name: str
    change: float
    moved: float


@dataclass(frozen=True)
class PoolTasks:
    """Tasks by the mixture that each gets: half the sum of absolute differences, and the tree over it.

    Where each block of the backbone has a mixture of its own, both are means over the blocks.
    """

    names: tuple[str, ...]
    weights: tuple[tuple[float, ...], ...]
    distances: tuple[tuple[float, ...], ...]
    merges: tuple[Merge, ...]
    order: tuple[int, ...]


@dataclass(frozen=True)
class Pool:
    """A pool as its page tells of it.

    `density`: the share of weights that each expert changes; `fractional`: of those, the share whose mask is not 1.
    `overlap`: of two experts, intersection over union of what they change; `chance`: what independent masks of the
    same densities would have. `mixture`: of the `tensors`. `masked`: all experts are masks over one change; else each
    has its own (soft merging). `active`, `forbidden`, `frozen`: what a person decided, the experts that may be chosen,
    parameters that nothing changes, and experts that do not learn. `measured`: on held-out domains, after its training.
    """

    experts: tuple[str, ...]
    weights: int
    density: tuple[float, ...]
    fractional: tuple[float, ...]
    union: float
    cells: tuple[PoolCell, ...]
    overlap: tuple[tuple[float, ...], ...]
    chance: tuple[tuple[float, ...], ...]
    tensors: tuple[PoolTensor, ...]
    mixture: str
    tasks: PoolTasks
    composition: Mapping[str, Any]
    masked: bool = True
    active: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    measured: tuple[MeasuredDomain, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def has_pool(model: Any) -> bool:
    """Whether a model's weights are chosen among experts that change them, so that there is a pool to explain."""
    return isinstance(model, EpisodicModel) and isinstance(model.mixture.experts, SparseDeltas | DenseDeltas)


@torch.no_grad()
def pool_of(model: EpisodicModel, tasks: Mapping[str, Routing] | None = None, shown: str | None = None) -> Pool:
    """Look at a pool. `tasks`: mixtures beside those it remembers; `shown`: the task whose change is listed by tensor.

    Without `shown` that is the even mixture. Nothing is run but the masks. Raises TypeError for experts that are
    neither masks over one change nor changes of their own.
    """
    deltas = model.mixture.experts
    if not isinstance(deltas, SparseDeltas | DenseDeltas):
        raise TypeError(f"pool_of: the experts are {type(deltas).__name__}; expected SparseDeltas or DenseDeltas.")
    known = {name: Routing(model.remembered(name).weights, len(model.experts)) for name in model.adaptations}
    mixtures = known | dict(tasks or {})
    even = Routing(torch.full((len(model.experts),), 1 / len(model.experts)), len(model.experts))
    at = even if shown is None else mixtures[shown]
    found = overlap(deltas)
    return Pool(
        experts=model.experts,
        weights=deltas.num_weights,
        density=_row(found.density),
        fractional=_row(found.fractional / found.density.clamp_min(1e-12)),
        union=found.union,
        cells=_cells(deltas),
        overlap=_rows(found.iou),
        chance=_rows(found.chance),
        tensors=_tensors(model, deltas, at),
        mixture="every expert alike" if shown is None else shown,
        tasks=_tasks(deltas, mixtures),
        composition={
            "method": model.composition.method,
            "backbone": {**model.composition.backbone, "fingerprint": model.fingerprint},
            "config": dict(model.composition.config),
        },
        masked=isinstance(deltas, SparseDeltas),
        active=model.active,
        forbidden=model.forbidden,
        frozen=model.frozen_experts,
        measured=measured_in(model.whole),
    )


def decided_by_hand(
    experts: Sequence[str], active: Sequence[str], forbidden: Sequence[str], frozen: Sequence[str]
) -> list[str]:
    """In sentences, what a person decided about a pool; nothing where nobody did."""
    said: list[str] = []
    left_out = [name for name in experts if active and name not in active]
    if left_out:
        said.append(f"By a person's word, never chosen: {', '.join(left_out)}.")
    if forbidden:
        shown = ", ".join(forbidden[:3]) + (f" and {len(forbidden) - 3} more" if len(forbidden) > 3 else "")
        stay = f"{len(forbidden)} parameter{'s stay' if len(forbidden) > 1 else ' stays'}"
        said.append(f"By a person's word, {stay} as pretrained whatever an expert says: {shown}.")
    if frozen:
        said.append(f"By a person's word, further training leaves as they are: {', '.join(frozen)}.")
    return said


def _units(deltas: SparseDeltas | DenseDeltas, name: str) -> tuple[Tensor, int]:
    """Masks (experts, units), and how many weights a unit holds; of dense changes, where they are not 0."""
    if isinstance(deltas, DenseDeltas):
        return (deltas.delta[key_of(name)].detach().cpu().flatten(1) != 0).float(), 1
    masks = deltas.masks(name).cpu()
    masks = masks.reshape(len(masks), -1)
    return masks, deltas.change_of(name).numel() // max(1, masks.shape[1])


def _cells(deltas: SparseDeltas | DenseDeltas) -> tuple[PoolCell, ...]:
    found: dict[tuple[str, str], tuple[int, Tensor]] = {}
    for name in deltas.names:
        masks, each = _units(deltas, name)
        place = place_of(name)
        count, live = found.get(place, (0, torch.zeros(deltas.num_experts, dtype=torch.float64)))
        found[place] = count + masks.shape[1] * each, live + (masks > 0).sum(1).double() * each
    return tuple(PoolCell(*place, count, _row(live / max(count, 1))) for place, (count, live) in found.items())


def place_of(name: str) -> tuple[str, str]:
    """Where a parameter lies, by the numbers in its name, and of what kind it is: `3`, `attention.q_proj.weight`."""
    parts = name.split(".")
    numbers = [part for part in parts if _NUMBER.fullmatch(part)]
    if not numbers:
        return OUTSIDE, ".".join(parts[-2:])
    last = len(parts) - 1 - parts[::-1].index(numbers[-1])
    return ".".join(numbers), ".".join(parts[last + 1 :]) or parts[0]


def _tensors(model: EpisodicModel, deltas: SparseDeltas | DenseDeltas, routing: Routing) -> tuple[PoolTensor, ...]:
    base, weights = dict(model.backbone.named_parameters()), routing.dense().cpu()
    found: list[PoolTensor] = []
    for name in deltas.names:
        if isinstance(deltas, DenseDeltas):
            rows = deltas.delta[key_of(name)].detach().cpu().float().flatten(1)
            moved = weights.float() @ rows
        else:
            masks, each = _units(deltas, name)
            delta = deltas.change_of(name).detach().cpu().float().reshape(-1, each)
            moved = (deltas.weights_at(name, weights).to(masks.dtype) @ masks)[:, None] * delta
        size = float(base[name].detach().float().norm())
        if size == 0 or name in model.forbidden:
            continue
        share = float((moved != 0).double().mean()) if moved.numel() else 0.0
        found.append(PoolTensor(name, float(moved.norm()) / size, share))
    return tuple(sorted(found, key=lambda one: -one.change)[:TOP])


def _tasks(deltas: SparseDeltas | DenseDeltas, mixtures: Mapping[str, Routing]) -> PoolTasks:
    names = tuple(mixtures)
    if not names:
        return PoolTasks((), (), (), (), ())
    by_block = torch.stack([deltas.by_block(mixtures[name].dense().cpu().double()) for name in names])
    weights = deltas.mean_over_blocks(by_block)
    distances = deltas.mean_over_blocks((by_block[:, None] - by_block[None]).abs()).sum(-1) / 2
    merges = tuple(average_linkage(distances))
    order = tuple(leaf_order(merges, len(names))) if merges else (0,)
    return PoolTasks(names, _rows(weights), _rows(distances), merges, order)


def _row(values: Tensor) -> tuple[float, ...]:
    return tuple(values.tolist())


def _rows(values: Tensor | Sequence[Tensor]) -> tuple[tuple[float, ...], ...]:
    return tuple(_row(row) for row in values)
