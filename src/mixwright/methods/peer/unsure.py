"""Unsure retrieval: where coverage is below a threshold, spend more, or say so.

Thresholds are quantiles of coverage on held-out data, for each head of each layer, since coverage depends on the size
of the scores. They live in the routers and are saved with the model.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixwright.evaluation.neuron_sites import neuron_sites, neurons_of, plain_router
from mixwright.evaluation.selective import coverages
from mixwright.experts.base import AbstractExperts
from mixwright.experts.dense_branch import DenseBranch, DenseNeurons
from mixwright.ops.neuron import Activation
from mixwright.routers.adaptive import AdaptiveRouter
from mixwright.routers.product_key import ProductKeyRouter
from mixwright.routers.retriever import AbstractRetriever
from mixwright.routers.unsure import FlaggingRouter, LeaningRouter, WideningRouter

OWN = ("coverage", "max_k", "thresholds", "wider", "leaning")
"""Names of what the routers around a router hold."""


def coverage_thresholds(model: nn.Module, data: Iterable[Any], quantile: float) -> dict[str, Tensor]:
    """Site -> thresholds `(heads,)` that the `quantile` share of the tokens of `data` falls below, plainly retrieved.

    Fallbacks and adaptive routers are taken out of `model`. Raises ValueError for a quantile outside 0 to 1.
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile={quantile}: expected the share of tokens to flag, from 0 to 1.")
    retrieve_plainly(model)
    measured = coverages(model, data)
    return {site: torch.quantile(rows.double(), quantile, dim=0).float() for site, rows in measured.items()}


def retrieve_plainly(model: nn.Module) -> None:
    """Take every fallback and adaptive router out of `model`: its product-key routers and neurons alone."""
    for site in neuron_sites(model).values():
        _set(site, plain_router(site.router), neurons_of(site.experts))


def flag_unsure(model: nn.Module, thresholds: Mapping[str, Tensor]) -> None:
    """Let every site say which heads are unsure, and change nothing else."""
    for name, site in neuron_sites(model).items():
        _set(site, FlaggingRouter(plain_router(site.router), _of(thresholds, name)), neurons_of(site.experts))


def widen_unsure(model: nn.Module, thresholds: Mapping[str, Tensor], wider: int) -> None:
    """Let unsure heads retrieve `wider` experts, usually 2 to 4 times top_k."""
    for name, site in neuron_sites(model).items():
        router = WideningRouter(plain_router(site.router), _of(thresholds, name), wider)
        _set(site, router, neurons_of(site.experts))


def lean_unsure(model: nn.Module, thresholds: Mapping[str, Tensor], dense: Mapping[str, nn.Module]) -> None:
    """Let a dense layer of each site, such as the feed-forward that stood there, stand in for what was missed.

    Only `DenseNeurons` can be saved with a composition.
    """
    for name, site in neuron_sites(model).items():
        router = LeaningRouter(plain_router(site.router), _of(thresholds, name))
        _set(site, router, DenseBranch(neurons_of(site.experts), dense[name]))


def retrieve_adaptively(model: nn.Module, coverage: float, max_k: int) -> None:
    """Let every head of every site retrieve as few experts as hold `coverage` of its softmax, at most `max_k`."""
    for site in neuron_sites(model).values():
        _set(site, AdaptiveRouter(plain_router(site.router), coverage, max_k), neurons_of(site.experts))


@dataclass(frozen=True, slots=True)
class Around:
    """What stood around a stored site's plain router and neurons, to be put around them again."""

    router: Callable[[ProductKeyRouter], AbstractRetriever]
    experts: Callable[[AbstractExperts], AbstractExperts]


def taken_apart(
    router: Mapping[str, Tensor], experts: Mapping[str, Tensor], activation: Activation
) -> tuple[dict[str, Tensor], dict[str, Tensor], Around]:
    """The stored tensors of a plain router and of its neurons, and what stood around them."""
    plain, own = _inside(router, "router")
    neurons, dense = _inside(experts, "experts")
    return plain, neurons, Around(_router(own), _experts(dense, activation))


def _router(own: Mapping[str, Tensor]) -> Callable[[ProductKeyRouter], AbstractRetriever]:
    """By the tensors that a kind has and no other has."""
    if set(own) == {"coverage", "max_k"}:
        return lambda plain: AdaptiveRouter(plain, float(own["coverage"]), int(own["max_k"]))
    if set(own) == {"thresholds", "wider"}:
        return lambda plain: WideningRouter(plain, own["thresholds"], int(own["wider"]))
    if set(own) == {"thresholds", "leaning"}:
        return lambda plain: LeaningRouter(plain, own["thresholds"])
    if set(own) == {"thresholds"}:
        return lambda plain: FlaggingRouter(plain, own["thresholds"])
    if own:
        raise ValueError(f"no router is known that has {', '.join(sorted(own))}.")
    return lambda plain: plain


def _experts(own: Mapping[str, Tensor], activation: Activation) -> Callable[[AbstractExperts], AbstractExperts]:
    if not own:
        return lambda plain: plain
    parts = {name.removeprefix("dense."): tensor for name, tensor in own.items()}
    if "rows" not in parts or not set(parts) <= {"rows", "bias", "out_bias"}:
        raise ValueError(f"no dense branch is known that has {', '.join(sorted(own))}.")
    return lambda plain: DenseBranch(plain, DenseNeurons(activation=activation, **parts))


def _inside(stored: Mapping[str, Tensor], part: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors under `part` by their names inside it, and the others; all and none where nothing stands around."""
    around = [name for name in stored if name in OWN or name.startswith("dense.")]
    if not around:
        return dict(stored), {}
    inside = {name.removeprefix(f"{part}."): t for name, t in stored.items() if name.startswith(f"{part}.")}
    return inside, {name: t for name, t in stored.items() if not name.startswith(f"{part}.")}


def _of(thresholds: Mapping[str, Tensor], site: str) -> Tensor:
    if site not in thresholds:
        raise ValueError(f"no thresholds for {site}; there are some for {', '.join(thresholds) or 'no site'}.")
    return thresholds[site]


def _set(site: Any, router: AbstractRetriever, experts: nn.Module) -> None:
    """Observers stay with the site."""
    outer = site.router
    if router is not outer:
        router.observers, outer.observers = [*outer.observers], []
    device = next(plain_router(router).parameters()).device
    site.router, site.experts = router.train(site.training).to(device), experts.train(site.training)
