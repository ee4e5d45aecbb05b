"""Hybrids made by hand, so that their page can be tested without one: any components, any number of blocks."""

from dataclasses import replace
from math import cos, exp
from typing import Any

from mixwright.evaluation.hybrid import BUDGET, Component, HybridExplanation, Measured, Texts
from mixwright.evaluation.hybrid_boundaries import Boundary
from mixwright.evaluation.hybrid_counterfactuals import Counterfactual, LeftOut
from mixwright.evaluation.hybrid_rows import Row
from mixwright.evaluation.hybrid_slices import Slice
from mixwright.evaluation.hybrid_sweep import Flatness, Grid, Sweep
from mixwright.evaluation.hybrid_trajectories import Trajectory
from mixwright.evaluation.intervals import Interval
from mixwright.evaluation.verdict import Verdict

NAMES = ["neox", "mamba"]
LICENCES: list[dict[str, Any]] = [
    {"component": "neox", "spdx": "Apache-2.0", "revision": "4f1c2d", "source": "LICENSE file", "gated": False},
    {"component": "mamba", "spdx": "MIT", "revision": "9b7a01", "source": "model card", "gated": False},
]
COST = [("Parameters", "3,012,480", "all components and projectors"), ("Decode state", "1.2 MB", "1,024 tokens")]


def gap(value: float, wide: float = 0.02) -> Interval:
    return Interval(value, value - wide, value + wide, wide / 2, 64)


def against(rival: str, value: float, wide: float = 0.02) -> Verdict:
    return Verdict("the hybrid", rival, BUDGET, gap(value, wide), (value,))


def hybrid(
    names: list[str] | None = None, blocks: int = 3, better: float = -0.05, wide: float = 0.02, **changes: Any
) -> HybridExplanation:
    """Weights that wave from block to block; `better`: the hybrid's loss minus that of its best component."""
    components = NAMES if names is None else names
    slots = ["embedding", *(f"blocks.{k}" for k in range(blocks)), "head"]
    rows = [_row(slot, place, len(components)) for place, slot in enumerate(slots)]
    losses = {"hybrid": 3.1, **{n: 3.1 - better + 0.1 * at for at, n in enumerate(components)}}
    if len(components) > 1:
        losses |= {"logit ensemble": 3.17, "uniform weights": 3.4}
    several = len(components) > 1
    made = HybridExplanation(
        components=[
            Component(
                name=name, architecture=f"Tiny{at}ForCausalLM", width=64 + at, parameters=100_000 + at,
                layers=["", *(f"layers {2 * k}\u2013{2 * k + 1}" for k in range(blocks)), ""],
            )
            for at, name in enumerate(components)
        ],
        slots=slots,
        rows=rows,
        texts=Texts(files=["wiki", "plays"], documents=64, tokens=12_345, cut=[]),
        systems=[
            Measured(system=name, loss=loss, is_component=name in components,
                     against=None if name == "hybrid" else against(name, 3.1 - loss, wide))
            for name, loss in losses.items()
        ],
        slices=[
            Slice(kind=kind, name=name, documents=20, tokens=4000, losses={k: v + 0.1 * at for k, v in losses.items()})
            for at, (kind, name) in enumerate([("all", "all texts"), ("file", "wiki"), ("file", "plays")])
        ],
        counterfactuals=[
            _forced(row, m, name, word, len(components))
            for row in rows for m, name in enumerate(components) for word in ("0", "1", "uniform")
        ] if several else [],
        left_out=[LeftOut(component=n, loss=3.9 + at, change=gap(0.8 + at)) for at, n in enumerate(components)]
        if several else [],
        boundaries=[
            Boundary(slot=slot, component=name, stream=None if slot == "embedding" else 1.2, given=1.1,
                     returned=2.0 + at, own=1.0, likeness=0.9 - 0.1 * at, mixed=1.3)
            for slot in slots[:-1] for at, name in enumerate(components)
        ],
        sweeps=[_sweep(row, components[0]) for row in rows] if several else [],
        grid=_grid(rows, components[0]) if len(components) == 2 else None,
        flatness=Flatness(eigenvalues=[0.12, 0.01, -0.002], gradient=0.003, rows=slots, tokens=2048)
        if several else None,
        trajectories=[
            _path(stage, row, m, name)
            for stage in ("search", "tune") for row in rows for m, name in enumerate(components)
        ],
        cost=COST,
        licences=[{**LICENCES[at % 2], "component": n} for at, n in enumerate(components)],
        obligations=["Keep the notices of neox and mamba."],
        missing=["How far another seed would lead: one run was given, so there is no band."],
        composition={"method": "manticore", "config": {"num_blocks": blocks}, "backbone": {"fingerprint": "f1n9e4"}},
    )  # fmt: skip
    return replace(made, **changes)


def _row(slot: str, place: int, count: int) -> Row:
    raw = [exp(cos(1.7 * place + 2.1 * m)) for m in range(count)]
    return Row(name=slot, slots=(slot,), weights=tuple(value / sum(raw) for value in raw))


def _forced(row: Row, m: int, name: str, word: str, count: int) -> Counterfactual:
    target = {"0": 0.0, "1": 1.0, "uniform": 1 / count}[word]
    change = 0.9 * (row.weights[m] - target) ** 2 - 0.01
    return Counterfactual(
        row=row.name, component=name, forced=word, weight=row.weights[m], loss=3.1 + change, change=gap(change)
    )


def _sweep(row: Row, name: str) -> Sweep:
    weights = [place / 10 for place in range(11)]
    losses = [3.1 + 0.9 * (weight - row.weights[0]) ** 2 - 0.001 for weight in weights]
    return Sweep(
        row=row.name, component=name, weights=weights, losses=losses, chosen=row.weights[0], chosen_loss=3.1,
        curvature=1.8, curved_at=row.weights[0],
    )  # fmt: skip


def _grid(rows: list[Row], name: str) -> Grid:
    weights = [place / 5 for place in range(6)]
    one, other = rows[0].weights[0], rows[1].weights[0]
    losses = [[3.1 + (a - one) ** 2 + 0.3 * (b - other) ** 2 for b in weights] for a in weights]
    return Grid(component=name, rows=(rows[0].name, rows[1].name), weights=weights, losses=losses, chosen=(one, other))


def _path(stage: str, row: Row, m: int, name: str) -> Trajectory:
    end, even = row.weights[m], 1 / len(row.weights)
    steps = list(range(0, 201, 20))
    mean = [end if stage == "tune" else even + (end - even) * step / 200 for step in steps]
    wide = [0.0 if stage == "tune" else 0.0005 * step for step in steps]
    return Trajectory(
        stage=stage, slot=row.name, component=name, steps=steps, mean=mean, runs=3,
        low=[max(a - b, 0.0) for a, b in zip(mean, wide)], high=[min(a + b, 1.0) for a, b in zip(mean, wide)],
    )  # fmt: skip
