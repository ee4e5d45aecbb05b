"""A pool of random experts on any backbone, composed by hand: every site, token routing, mixed ranks and targets."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel, Composition
from mixwright.experts.lora import LoraExperts
from mixwright.routers.gate import PrototypeScores
from mixwright.routers.token import TokenRouter
from mixwright.sites import linear_sites, target_sites

torch.set_num_threads(1)  # models this small only lose time to a second thread


@dataclass(frozen=True)
class Factors:
    """What the catalogue holds of one expert at one site."""

    down: Tensor
    up: Tensor
    scale: float


Pool = dict[str, dict[str, Factors]]


def make_pool(
    backbone: nn.Module,
    ranks: Mapping[str, int] | None = None,
    targets: Sequence[str] = ("all-linear",),
    strength: float = 0.2,
    seed: int = 0,
) -> Pool:
    """Expert id -> site -> random factors; expert `c` adapts every second site only."""
    draw = torch.Generator().manual_seed(seed)
    sites = linear_sites(backbone)
    chosen = target_sites(backbone, targets)
    pool: Pool = {}
    for expert, rank in (ranks or {"a": 2, "b": 3, "c": 4, "d": 2}).items():
        pool[expert] = {
            path: Factors(
                torch.randn(rank, sites[path].d_in, generator=draw) * strength,
                torch.randn(sites[path].d_out, rank, generator=draw) * strength,
                2.0 / rank,
            )
            for i, path in enumerate(chosen)
            if expert != "c" or i % 2 == 0
        }
    return pool


def compose_pool(backbone: nn.Module, pool: Pool, top_k: int = 2, seed: int = 1) -> ComposedModel:
    """The pool on the backbone, with random gates."""
    draw = torch.Generator().manual_seed(seed)
    mixtures: dict[str, Mixture] = {}
    for path, site in linear_sites(backbone).items():
        factors = [pool[expert].get(path) for expert in pool]
        if not any(factors):
            continue
        gates = torch.randn(len(pool), site.d_in, generator=draw)
        weight = backbone.get_submodule(path).weight
        members = LoraExperts.stack([f and (f.down.to(weight.dtype), f.up.to(weight.dtype), f.scale) for f in factors])
        allowed = torch.tensor([f is not None for f in factors])
        router = TokenRouter(PrototypeScores(gates), top_k, allowed=allowed)
        mixtures[path] = Mixture(backbone.get_submodule(path), router, members)
    composition = Composition(
        method="by-hand",
        config={"top_k": top_k},
        backbone={"path": "somewhere/tiny"},
        experts=[{"id": expert, "licence": "apache-2.0"} for expert in pool],
    )
    return ComposedModel(backbone, mixtures, tuple(pool), composition)


@pytest.fixture
def pool_of() -> Callable[..., Pool]:
    return make_pool


@pytest.fixture
def composed() -> Callable[..., ComposedModel]:
    return compose_pool
