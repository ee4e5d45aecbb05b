"""Models routed by task, made by hand at a tiny size: any tasks, any kind of experts, no training."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mixwright.backbones.tiny import tiny_backbone
from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel, Composition
from mixwright.experts.factored import AbstractFactored
from mixwright.experts.poly import PolyExperts
from mixwright.experts.tensor import OrderedTensorExperts, TensorExperts
from mixwright.ops.tensor_product import ceil_radices
from mixwright.routers.base import AbstractRouter
from mixwright.routers.task import TaskLogits
from mixwright.sites import linear_sites

Make = Callable[[torch.Generator, int, int, int], AbstractFactored]
RANK = 2


def _random(made: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=made) * 0.3


def _leaves(made: torch.Generator, width: int, order: int, *leading: int) -> list[Tensor]:
    return [_random(made, *leading, RANK, q) for q in ceil_radices(width, order)]


def poly(made: torch.Generator, experts: int, d_in: int, d_out: int, heads: int = 1) -> AbstractFactored:
    return PolyExperts(_random(made, experts, RANK, d_in), _random(made, experts, RANK, d_out), heads)


def tensor(made: torch.Generator, experts: int, d_in: int, d_out: int) -> AbstractFactored:
    return TensorExperts(_leaves(made, d_in, 2, experts), _leaves(made, d_out, 2, experts), d_in, d_out)


def ordered(made: torch.Generator, experts: int, d_in: int, d_out: int) -> AbstractFactored:
    return OrderedTensorExperts(_leaves(made, d_in, 2, experts, 2), _leaves(made, d_out, 2, experts, 2), d_in, d_out)


KINDS: dict[str, Make] = {
    "poly": poly,
    "mhr": lambda made, experts, d_in, d_out: poly(made, experts, d_in, d_out, heads=8),
    "tensor": tensor,
    "ordered": ordered,
}


def task_model(
    kind: str = "tensor",
    tasks: tuple[str, ...] = ("topic", "mood", "topic again"),
    experts: int = 4,
    *,
    shared: bool = False,
    logits: Tensor | None = None,
    router: Callable[[int | None], AbstractRouter] | None = None,
    family: str = "llama",
    layers: int = 1,
    home: str = "",
) -> ComposedModel:
    """Random leaves; random logits unless some are given; one router for each site, or a `shared` one for all."""
    made = torch.Generator().manual_seed(0)
    backbone = tiny_backbone(family, **({} if family == "t5" else {"num_hidden_layers": layers}))
    sites = {path: site for path, site in linear_sites(backbone).items() if "." in path and "mlp" not in path}
    mixtures: dict[str, Mixture] = {}
    only: AbstractRouter | None = None
    for path, site in sites.items():
        members = KINDS[kind](made, experts, site.d_in, site.d_out)
        positions = [] if members.positions is None else [members.positions]
        drawn = 2 * torch.randn(len(tasks), *positions, experts, generator=made) if logits is None else logits.clone()
        own = router(members.positions) if router else TaskLogits(drawn)
        only = only or own
        mixtures[path] = Mixture(backbone.get_submodule(path), only if shared else own, members)
    described = Composition(
        method="poly", config={"tasks": list(tasks)}, backbone={"path": home, "fingerprint": "f1n9e4"}
    )
    model = ComposedModel(backbone, mixtures, tuple(f"latent-{number}" for number in range(experts)), described)
    assert isinstance(model, nn.Module)
    return model
