"""How good an expert is, measured when it is registered: the plain dict that stands on its card.

Gates do not silence a bad expert: its gate is trained like any other, and standardising discards the one thing that
could have told, the gate's size. So quality is measured on text, and `gain` may be added to the routing scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mixwright.composition.model import ComposedModel
from mixwright.evaluation.evaluate import evaluate
from mixwright.evaluation.intervals import Interval, paired_difference
from mixwright.evaluation.scores import AbstractTask
from mixwright.evaluation.systems import System, backbone, factors

DEAD_GATE = 0.02
"""Below this standard deviation the router's eps shrinks a gate, and its expert loses to others unfairly."""
HARM = 0.05
"""Nats per token on general text above which an expert is called harmful."""
TWIN = 0.9
"""Cosine of the updates above which two experts are called redundant."""

Factors = Mapping[str, tuple[Tensor, Tensor, float] | None]


def measure_quality(
    model: ComposedModel,
    expert: str,
    *,
    held_out: AbstractTask,
    general: AbstractTask | None = None,
    gates: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> dict[str, Any]:
    """The quality of one expert of `model`, for its card.

    `gain`: loss of the backbone minus that of the expert alone on `held_out`, in nats per token (per text for label
    matching), paired by example. `harm`: loss of the expert minus that of the backbone on `general`. `gate`: see
    `gate_diagnostics`. `redundancy`: see `redundancy`. `verdict`: see `verdict`. `gates`: expert id -> site -> vector.
    """
    found: dict[str, Any] = {"gain": asdict(_loss_drop(model, expert, held_out))}
    if general is not None:
        drop = _loss_drop(model, expert, general)
        found["harm"] = asdict(Interval(-drop.value, -drop.high, -drop.low, drop.stderr, drop.n))
    if gates and expert in gates:
        found["gate"] = gate_diagnostics(gates[expert])
    each = _by_expert(model)
    found["redundancy"] = redundancy(expert, each, gates)
    return found | {"verdict": verdict(found)}


def _loss_drop(model: ComposedModel, expert: str, task: AbstractTask) -> Interval:
    table = evaluate(model, [task], [backbone(), System(expert, lambda m: m.only(expert))])
    (row,) = table.cells("nats").values()
    return paired_difference(row["backbone"], row[expert])


def gate_diagnostics(gates: Mapping[str, Tensor]) -> dict[str, Any]:
    """`norm` and `std` (means over sites) of an expert's gates, and the `dead` sites, whose gate hardly varies."""
    norms = [float(gate.float().norm()) for gate in gates.values()]
    spreads = {site: float(gate.float().std(correction=0)) for site, gate in gates.items()}
    return {
        "norm": sum(norms) / max(1, len(norms)),
        "std": sum(spreads.values()) / max(1, len(spreads)),
        "sites": len(spreads),
        "dead": [site for site, spread in spreads.items() if spread < DEAD_GATE],
    }


def redundancy(
    expert: str, pool: Mapping[str, Factors], gates: Mapping[str, Mapping[str, Tensor]] | None = None
) -> dict[str, Any]:
    """Other expert -> cosine of the updates s B A over all sites (`update`), and of the gates (`gate`, None without).

    1 is a copy, 0 nothing in common. `nearest` is the other expert with the largest cosine of updates.
    """
    others = [name for name in pool if name != expert]
    found: dict[str, Any] = {
        name: {"update": update_cosine(pool[expert], pool[name]), "gate": _gate_cosine(expert, name, gates or {})}
        for name in others
    }
    nearest = max(others, key=lambda name: found[name]["update"], default=None)
    return {"nearest": nearest, "experts": found}


def update_cosine(one: Factors, other: Factors) -> float:
    """<dW, dW'> / (||dW|| ||dW'||) with dW = s B A at every site; from the factors, never forming a d x n matrix."""
    product = own = others = 0.0
    for site in {**one, **other}:
        mine, theirs = one.get(site), other.get(site)
        own += _inner(mine, mine)
        others += _inner(theirs, theirs)
        product += _inner(mine, theirs)
    return product / (own * others) ** 0.5 if own > 0.0 and others > 0.0 else 0.0


def _inner(one: tuple[Tensor, Tensor, float] | None, other: tuple[Tensor, Tensor, float] | None) -> float:
    if one is None or other is None:
        return 0.0
    down, up, scale = one
    other_down, other_up, other_scale = other
    # <B A, B' A'> = sum over ranks of (B^T B') * (A A'^T)
    inner = (up.double().T @ other_up.double()) * (down.double() @ other_down.double().T)
    return float(inner.sum()) * scale * other_scale


def _gate_cosine(one: str, other: str, gates: Mapping[str, Mapping[str, Tensor]]) -> float | None:
    mine, theirs = gates.get(one), gates.get(other)
    common = sorted(set(mine or {}) & set(theirs or {}))
    if not common or mine is None or theirs is None:
        return None
    each = [_cosine(mine[site], theirs[site]) for site in common]
    return sum(each) / len(each)


def _cosine(one: Float[Tensor, " d_in"], other: Float[Tensor, " d_in"]) -> float:
    return float(torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=0))


def verdict(quality: Mapping[str, Any]) -> dict[str, Any]:
    """`status` (good, doubtful, bad) and the `reasons`, in words.

    bad: the held-out gain's interval lies below zero. doubtful: it contains zero; or harm on general text is above 0.05
    nats beyond doubt; or some gates are dead; or another expert's update has a cosine above 0.9.
    """
    gain, harm = quality["gain"], quality.get("harm")
    reasons: list[str] = []
    if gain["high"] < 0.0:
        reasons.append("worse than the backbone on its own held-out text")
    elif gain["low"] <= 0.0:
        reasons.append("no clear gain over the backbone on its own held-out text")
    if harm is not None and harm["low"] > HARM:
        reasons.append(f"costs {harm['value']:.2f} nats on general text when it acts alone")
    dead: Sequence[str] = quality.get("gate", {}).get("dead", ())
    if dead:
        reasons.append(f"{len(dead)} of {quality['gate']['sites']} gates have hardly any spread; train them longer")
    nearest = quality["redundancy"]["nearest"]
    if nearest is not None and quality["redundancy"]["experts"][nearest]["update"] > TWIN:
        reasons.append(f"nearly the same update as {nearest}")
    status = "bad" if gain["high"] < 0.0 else "doubtful" if reasons else "good"
    return {"status": status, "reasons": reasons}


def _by_expert(model: ComposedModel) -> dict[str, Factors]:
    sites = factors(model)
    each = {name: {site: rows[at] for site, rows in sites.items()} for at, name in enumerate(model.experts)}
    return {name: found for name, found in each.items() if any(entry is not None for entry in found.values())}
