"""Staged introduction: start small and grow, in place, while the model goes on giving the same answers.

    TLoRA of one term -> more terms -> weights per task -> weights per task and order position

Terms are split into two copies that together are what one was: without tasks each has half of its first leaf, with
tasks half of its gate, sigma(z') = sigma(z) / 2. Copies that stayed equal would learn alike forever, so their first
leaves are moved apart, by +e and -e, which cancels in the sum. LoRA -> Poly is the same with matrices for leaves.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mixwright.experts.factored import AbstractFactored
from mixwright.experts.poly import PolyExperts
from mixwright.methods.tensorpoly.config import ORDERED, TensorPolyConfig
from mixwright.methods.tensorpoly.latent import assemble
from mixwright.methods.tensorpoly.model import learned, pool, shared_by
from mixwright.routers.base import AbstractRouter
from mixwright.routers.constant import ConstantRouter
from mixwright.routers.task import TaskLogits

if TYPE_CHECKING:
    from mixwright.methods.tensorpoly.model import TaskComposedModel

APART = 0.1
"""How far the first leaves of two copies are moved apart, beside their root mean square."""

Leaves = list[Tensor]


def grow_terms(model: "TaskComposedModel", num_latent: int, seed: int = 0) -> None:
    """Split latent experts until there are `num_latent`; those that were there keep their ids, copies come after them.

    Raises ValueError for fewer than there are, and where no split is exact: straight-through gates, and TLoRA under
    norm="pair", which undoes what halves a term.
    """
    config = _growing(model)
    held = config.num_latent or 1
    if num_latent <= held:
        raise ValueError(f"num_latent={num_latent}: the model has {held} latent experts; growth only adds.")
    if config.experts == "tlora" and config.norm == "pair":
        raise ValueError("norm='pair' gives both halves of a term the size of the whole; grow_router first.")
    if config.experts == "lora":
        raise ValueError("lora is one expert; grow_router makes it a Poly of one skill, which then splits.")
    draw = torch.Generator().manual_seed(seed)
    factors = {site: _leaves(mixture.experts) for site, mixture in model.mixtures.items()}
    logits = _logits(model)
    by_gate = config.experts == "tensorpoly-1" and config.norm == "pair"
    while held < num_latent:
        parents = list(range(min(held, num_latent - held)))
        logits = {key: _split_gates(z, parents, draw, even=not by_gate) for key, z in logits.items()}
        for down, up in factors.values():
            for side in (down, up):
                side[:] = _split(side, parents, draw, halve=not config.is_routed, apart=not by_gate)
        held += len(parents)
    grown = replace(config, num_latent=num_latent)
    _put(model, grown, factors, _same_sharing(model, grown, logits))


def grow_router(model: "TaskComposedModel", tasks: Sequence[str] | None = None) -> None:
    """TLoRA becomes TensorPoly-I, LoRA becomes Poly: every task gets weights, at first the same for all.

    `tasks` names them, unless the config does. Uniform weights average what TLoRA adds up, so the first leaves grow by
    the number of terms. Raises ValueError where that can't be: several terms under norm="pair".
    """
    config = _growing(model)
    named = tuple(tasks or config.tasks)
    if config.is_routed:
        raise ValueError(f"{config.experts} has weights per task already.")
    if config.tasks and named != config.tasks:
        raise ValueError(f"tasks: the model has its own, {', '.join(config.tasks[:5])}; leave tasks out.")
    if not named:
        raise ValueError("tasks: missing; give the names of the tasks that get weights.")
    latent = config.num_latent or 1
    if config.norm == "pair" and latent > 1:
        raise ValueError(
            f"norm='pair' fixes the size of each of the {latent} terms, and averaging them would shrink their sum; "
            "grow the router while there is one term, and the terms afterwards."
        )
    grown = replace(config, experts="poly" if config.experts == "lora" else "tensorpoly-1", tasks=named)
    routers: dict[str, AbstractRouter] = {}
    factors: dict[str, tuple[Leaves, Leaves]] = {}
    for site, mixture in model.mixtures.items():
        down, up = _leaves(mixture.experts)
        key = shared_by(site, grown.share)
        if key not in routers:
            routers[key] = learned(grown, down[0].new_zeros(len(named), latent))
        if config.norm == "none":
            times = 1 / _uniform(latent, down[0])
            down, up = [down[0] * times, *down[1:]], [up[0] * times, *up[1:]]
        factors[site] = down, up
    _put(model, grown, factors, {site: routers[shared_by(site, grown.share)] for site in factors})


def grow_order(model: "TaskComposedModel", to: str = "entangled", tolerance: float = 1e-6) -> float:
    """TensorPoly-I gets weights of its own at every order position. Returns the largest relative change of an update.

    To `entangled`, with as many groups as terms: exact. Term g of I becomes group g, to which only the leaves of expert
    g contribute at first; order 1 keeps the weights, the others start uniform. To `tensorpoly-2`: every position gets
    the weights of I, which is the same function only where each task has one term. Raises ValueError, and changes
    nothing, where some task's update at some site would change by more than `tolerance`.
    """
    config = _growing(model)
    if config.experts != "tensorpoly-1":
        raise ValueError(f"experts={config.experts}: only tensorpoly-1 grows weights per order position.")
    if to not in ORDERED:
        raise ValueError(f"to={to!r}: expected {' or '.join(ORDERED)}.")
    if to == "entangled" and config.norm == "pair":
        raise ValueError("norm='pair' would normalise away the weights inside a group; only norm='none' is exact.")
    entangled, latent = to == "entangled", config.num_latent or 1
    grown = replace(config, experts=to, groups=latent if entangled else 1)  # type: ignore[arg-type]
    spread = _order_one if entangled else _every_order
    logits = {key: spread(z, config.order) for key, z in _logits(model).items()}
    routers = _same_sharing(model, grown, logits)
    factors: dict[str, tuple[Leaves, Leaves]] = {}
    for site, mixture in model.mixtures.items():
        down, up = _leaves(mixture.experts)
        factors[site] = (_grouped(down), _grouped(up)) if entangled else (_alone(down), _alone(up))
    change, where = (0.0, "") if entangled else _largest_change(model, grown, factors, routers)
    if change > tolerance:
        raise ValueError(
            f"{to} can't be what TensorPoly-I is here: the update would change by {change:.1%} {where}. It can where "
            "every task uses one term; grow to 'entangled', which is exact, or give a tolerance."
        )
    _put(model, grown, factors, routers)
    return change


def _growing(model: "TaskComposedModel") -> TensorPolyConfig:
    config = model.settings
    if config.straight_through:
        raise ValueError("straight_through rounds halved and uniform gates to 0; grow without it.")
    return config


def _logits(model: "TaskComposedModel") -> dict[int, Tensor]:
    """Z of each router, by the router's id."""
    routers = [mixture.router for mixture in model.mixtures.values()]
    return {id(router): router.logits.detach() for router in routers if isinstance(router, TaskLogits)}


def _same_sharing(
    model: "TaskComposedModel", config: TensorPolyConfig, logits: Mapping[int, Tensor]
) -> dict[str, AbstractRouter]:
    """New routers of these logits for the sites whose routers had the old ones; weights of one where there are none."""
    made: dict[int, AbstractRouter] = {key: learned(config, z) for key, z in logits.items()}
    for mixture in model.mixtures.values():
        if id(mixture.router) not in made:
            weights = mixture.router.get_buffer("weights")
            made[id(mixture.router)] = ConstantRouter(weights.new_ones(config.num_latent or 1))
    return {site: made[id(mixture.router)] for site, mixture in model.mixtures.items()}


def _leaves(experts: object) -> tuple[Leaves, Leaves]:
    assert isinstance(experts, AbstractFactored)
    if isinstance(experts, PolyExperts):
        return [experts.down.detach()], [experts.up.detach()]
    return [t.detach() for t in experts.down], [t.detach() for t in experts.up]  # type: ignore[union-attr]


def _split(leaves: Leaves, parents: Sequence[int], draw: torch.Generator, *, halve: bool, apart: bool) -> Leaves:
    """The leaves with the `parents` once more after them; the first ones halved, and moved apart, as asked."""
    chosen = list(parents)
    grown = [torch.cat([leaf, leaf[chosen]]) for leaf in leaves]
    first, kept = grown[0], len(leaves[0])
    if halve:
        first[chosen] *= 0.5
        first[kept:] *= 0.5
    if apart:
        size = APART * float(leaves[0][chosen].square().mean().sqrt())
        shift = size * torch.randn(first[kept:].shape, generator=draw, dtype=first.dtype).to(first.device)
        first[chosen] += shift
        first[kept:] -= shift
    return grown


def _split_gates(z: Tensor, parents: Sequence[int], draw: torch.Generator, *, even: bool) -> Tensor:
    """Logits (tasks, ..., experts) with sigma(z) of each parent shared among two: in halves, or by a share per task."""
    chosen = list(parents)
    old = z[..., chosen]
    share = torch.full_like(old, 0.5)
    if not even:
        share = (0.4 + 0.2 * torch.rand(old.shape, generator=draw, dtype=old.dtype)).to(old.device)
    grown = torch.cat([z, _logit_of_share(old, 1 - share)], -1)
    grown[..., chosen] = _logit_of_share(old, share)
    return grown


def _logit_of_share(z: Tensor, share: Tensor) -> Tensor:
    """z' with sigma(z') = share sigma(z): -log((1 - share) / share + exp(-z) / share), which never overflows."""
    return -torch.logaddexp(torch.log1p(-share) - share.log(), -z - share.log())


def _order_one(z: Tensor, order: int) -> Tensor:
    """(tasks, experts) -> (tasks, order, experts): these weights for the first leaf, uniform ones for the others."""
    return torch.stack([z, *[torch.zeros_like(z)] * (order - 1)], 1)


def _every_order(z: Tensor, order: int) -> Tensor:
    return torch.stack([z] * order, 1)


def _grouped(leaves: Leaves) -> Leaves:
    """(terms, rank, q) -> (terms, groups = terms, rank, q), block-diagonal; later leaves as many times as large."""
    latent = len(leaves[0])
    one = torch.eye(latent, dtype=leaves[0].dtype, device=leaves[0].device)[..., None, None]
    times = 1 / _uniform(latent, leaves[0])
    return [one * leaf[None] * (1 if n == 0 else times) for n, leaf in enumerate(leaves)]


def _alone(leaves: Leaves) -> Leaves:
    return [leaf[:, None].clone() for leaf in leaves]


def _uniform(latent: int, like: Tensor) -> float:
    """What a router makes of logits of zero: 1 / latent but for its epsilon."""
    return float(TaskLogits(torch.zeros(1, latent, dtype=like.dtype)).table()[0, 0].detach())


def _largest_change(
    model: "TaskComposedModel",
    config: TensorPolyConfig,
    factors: Mapping[str, tuple[Leaves, Leaves]],
    routers: Mapping[str, AbstractRouter],
) -> tuple[float, str]:
    """max ||dW' - dW|| / ||dW|| over sites and tasks, and where that is."""
    worst, where = 0.0, ""
    for site, mixture in model.mixtures.items():
        experts = mixture.experts
        router, other = mixture.router, routers[site]
        assert isinstance(experts, AbstractFactored)
        assert isinstance(router, TaskLogits) and isinstance(other, TaskLogits)
        grown = assemble(config, *factors[site], experts.d_in, experts.d_out)
        with torch.no_grad():
            before = [t.double() for t in experts.factors(router.table())]
            after = [t.double() for t in grown.factors(other.table())]
        for task, name in enumerate(config.tasks):
            (a, b), (c, d) = ([side[task] for side in pair] for pair in (before, after))
            size = _product_norm(a, b)
            change = _product_norm(torch.cat([a, c]), torch.cat([b, -d]))
            if change > worst * size and change > 0:
                worst, where = change / size if size else math.inf, f"for task {name!r} at {site}"
    return worst, where


def _product_norm(down: Tensor, up: Tensor) -> float:
    """||up^T down||, from two triangular factors: small differences stay exact."""
    right, left = (torch.linalg.qr(side.T, mode="r").R for side in (down, up))
    return float((left @ right.T).norm())


def _put(
    model: "TaskComposedModel",
    config: TensorPolyConfig,
    factors: Mapping[str, tuple[Leaves, Leaves]],
    routers: Mapping[str, AbstractRouter],
) -> None:
    """The grown experts and routers in their places, and the model's description of itself."""
    for site, mixture in model.mixtures.items():
        held = mixture.experts
        assert isinstance(held, AbstractFactored)
        mixture.experts = assemble(config, *factors[site], held.d_in, held.d_out).train(mixture.training)
        mixture.router = routers[site].train(mixture.training)
    model.experts = pool(config)
    model.composition = replace(model.composition, config=asdict(config))
