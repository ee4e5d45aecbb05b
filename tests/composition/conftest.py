"""A pool of random experts on any backbone, composed by hand: every site, token routing, mixed ranks and targets."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel, Composition
from mixwright.experts.factored import AbstractFactored
from mixwright.experts.lora import LoraExperts
from mixwright.experts.poly import PolyExperts
from mixwright.experts.tensor import OrderedTensorExperts, TensorExperts
from mixwright.routers.constant import ConstantRouter
from mixwright.routers.gate import PrototypeScores
from mixwright.routers.task import TaskLogits
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


TASK_KINDS = ("lora", "poly", "mhr", "tlora", "tensorpoly-1", "tensorpoly-2", "entangled")


def experts_of(kind: str, d_in: int, d_out: int, latent: int, rank: int, draw: torch.Generator) -> AbstractFactored:
    """Random experts of a kind, large enough to be seen."""
    if kind in ("lora", "poly", "mhr"):
        latent = 1 if kind == "lora" else latent
        down = torch.randn(latent, rank, d_in, generator=draw) * 0.2
        return PolyExperts(
            down, torch.randn(latent, rank, d_out, generator=draw) * 0.3, heads=4 if kind == "mhr" else 1
        )
    groups = {"tensorpoly-2": (1,), "entangled": (3,)}.get(kind, ())

    def leaves(width: int) -> list[Tensor]:
        size = (latent, *groups, rank, math.isqrt(width - 1) + 1)
        return [torch.randn(size, generator=draw) * 0.5 for _ in range(2)]

    made = OrderedTensorExperts if groups else TensorExperts
    return made(leaves(d_in), leaves(d_out), d_in, d_out)


def compose_by_task(
    backbone: nn.Module,
    kind: str = "tensorpoly-1",
    tasks: int = 3,
    *,
    latent: int = 3,
    rank: int = 4,
    seed: int = 0,
    targets: Sequence[str] = ("all-linear",),
    noise: bool = False,
) -> ComposedModel:
    """Latent experts of a kind on the backbone, chosen by task with random logits."""
    draw = torch.Generator().manual_seed(seed)
    mixtures: dict[str, Mixture] = {}
    for path in target_sites(backbone, targets):
        site = linear_sites(backbone)[path]
        experts = experts_of(kind, site.d_in, site.d_out, latent, rank, draw)
        positions = () if experts.positions is None else (experts.positions,)
        logits = torch.randn(tasks, *positions, experts.num_experts, generator=draw) * 2
        router = TaskLogits(logits, noise=noise) if kind != "tlora" else ConstantRouter(torch.ones(latent))
        mixtures[path] = Mixture(backbone.get_submodule(path), router, experts)
    pool = tuple(f"latent-{i}" for i in range(experts.num_experts))
    composition = Composition(method="by-hand", backbone={"path": "somewhere/tiny"}, citation="@misc{none}")
    return ComposedModel(backbone, mixtures, pool, composition)


@pytest.fixture
def by_task() -> Callable[..., ComposedModel]:
    return compose_by_task
