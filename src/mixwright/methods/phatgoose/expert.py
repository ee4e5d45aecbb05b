"""One expert on a backbone, as PHATGOOSE trains it: first the LoRA alone, then its gate alone."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel, Composition
from mixwright.experts.lora import LoraExperts
from mixwright.methods.phatgoose.config import PhatgooseConfig
from mixwright.routers.constant import ConstantRouter
from mixwright.routers.gate import SigmoidGate
from mixwright.sites import Site, linear_sites, select
from mixwright.training.stage import Trained

INIT_STD = 0.01
ALL_LINEAR = "all-linear"


def expert_sites(backbone: nn.Module, patterns: Sequence[str]) -> dict[str, Site]:
    """The sites that a new expert adapts. `all-linear`: every linear layer of every block (section 4.1).

    A block is a member of a numbered list (`layers.0`), so embeddings, poolers and heads are left out; a backbone
    without such lists gives all its linear layers. Raises ValueError when there is none, or a pattern names none.
    """
    sites = linear_sites(backbone)
    if not sites:
        raise ValueError(f"{type(backbone).__name__} has no linear layer to adapt.")
    in_blocks = [path for path in sites if any(part.isdigit() for part in path.split("."))]
    chosen = set(in_blocks or sites) if ALL_LINEAR in patterns else set[str]()
    named = [pattern for pattern in patterns if pattern != ALL_LINEAR]
    chosen.update(select(list(sites), named) if named else ())
    return {path: site for path, site in sites.items() if path in chosen}


def new_expert(backbone: nn.Module, config: PhatgooseConfig, seed: int, expert_id: str = "expert") -> ComposedModel:
    """An untrained expert at weight 1: h = W u + (alpha / r) B A u, with A ~ N(0, 0.01^2) and B = 0 (released code).

    The factors are float32 whatever the backbone's dtype, drawn from `seed` alone, site after site.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = config.alpha / config.rank
    factors: dict[str, tuple[Tensor, Tensor, float]] = {}
    for path, site in expert_sites(backbone, config.target_modules).items():
        down = torch.empty(config.rank, site.d_in).normal_(0.0, INIT_STD, generator=generator)
        factors[path] = (down, torch.zeros(site.d_out, config.rank), scale)
    return at_full_strength(backbone, factors, expert_id)


def at_full_strength(
    backbone: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor, float]], expert_id: str = "expert"
) -> ComposedModel:
    """One expert acting everywhere at weight 1, as it is trained in stage *expert*."""
    mixtures: dict[str, Mixture] = {}
    for path, factor in factors.items():
        device = _device(backbone, path)
        experts = LoraExperts.stack([_float32(factor)], device)
        mixtures[path] = Mixture(backbone.get_submodule(path), ConstantRouter(torch.ones(1, device=device)), experts)
    return ComposedModel(backbone, mixtures, (expert_id,), Composition(method="phatgoose"))


def with_gates(model: ComposedModel) -> ComposedModel:
    """The same model, in place, with a gate at zero before each expert: h = W u + sigmoid(v . u) (alpha / r) B A u (eq. 2).

    At zero every gate gives exactly half of the expert.
    """
    for path, mixture in model.mixtures.items():
        down = mixture.experts.get_parameter("down")
        mixture.router = SigmoidGate(down.shape[-1]).to(_device(model.backbone, path))
    return model


def trained_expert(model: ComposedModel) -> Trained:
    """The factors, and the gates if there are any, of a model with one expert; padding to a common rank is not undone."""
    factors: dict[str, tuple[Tensor, Tensor, float]] = {}
    gates: dict[str, Tensor] = {}
    for path, mixture in model.mixtures.items():
        experts = mixture.experts
        down, up = experts.get_parameter("down"), experts.get_parameter("up")
        scale = experts.get_buffer("scale")
        factors[path] = (down[0].detach().cpu().clone(), up[0].detach().cpu().clone(), scale[0].item())
        if isinstance(mixture.router, SigmoidGate):
            gates[path] = mixture.router.gate[0].detach().float().cpu().clone()
    return Trained(factors=factors, gates=gates or None)


def _float32(factor: tuple[Tensor, Tensor, float]) -> tuple[Tensor, Tensor, float]:
    down, up, scale = factor
    return down.float(), up.float(), scale


def _device(backbone: nn.Module, path: str) -> torch.device:
    return next(backbone.get_submodule(path).parameters()).device
