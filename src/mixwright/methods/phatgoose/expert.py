"""One expert on a backbone, as PHATGOOSE trains it: first the LoRA alone, then its gate alone."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel, Composition
from mixwright.composition.probe import called_sites
from mixwright.experts.lora import LoraExperts
from mixwright.methods.phatgoose.config import PhatgooseConfig
from mixwright.routers.constant import ConstantRouter
from mixwright.routers.gate import SigmoidGate
from mixwright.sites import linear_sites
from mixwright.training.stage import Trained

INIT_STD = 0.01


def new_expert(backbone: nn.Module, config: PhatgooseConfig, seed: int, expert_id: str = "expert") -> ComposedModel:
    """An untrained expert at weight 1: h = W u + (alpha / r) B A u, with A ~ N(0, 0.01^2) and B = 0 (released code).

    Sites are those of `config.target_modules`; by default every linear layer of every block (section 4.1). The factors
    are float32 whatever the backbone's dtype, drawn from `seed` alone, site after site.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = config.alpha / config.rank
    factors: dict[str, tuple[Tensor, Tensor, float]] = {}
    sites = linear_sites(backbone)
    for path in called_sites(backbone, config.target_modules):
        site = sites[path]
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
    model = ComposedModel(backbone, mixtures, (expert_id,), Composition(method="phatgoose"))
    return model.train(backbone.training)


def with_gates(model: ComposedModel) -> ComposedModel:
    """The same model, in place, with a gate at zero for each site: h = W u + sigmoid(v . u) (alpha / r) B A u (eq. 2).

    At zero every gate gives exactly half of the expert.
    """
    for path, mixture in model.mixtures.items():
        down = mixture.experts.get_parameter("down")
        mixture.router = SigmoidGate(down.shape[-1]).to(_device(model.backbone, path)).train(mixture.training)
    return model


def trained_expert(model: ComposedModel, scale: float | None = None) -> Trained:
    """The factors, and the gates if there are any, of a model with one expert.

    `scale` is the exact alpha / r; without it the float32 one that the model holds.
    """
    factors: dict[str, tuple[Tensor, Tensor, float]] = {}
    gates: dict[str, Tensor] = {}
    for path, mixture in model.mixtures.items():
        experts = mixture.experts
        down, up = experts.get_parameter("down"), experts.get_parameter("up")
        held = experts.get_buffer("scale")[0].item() if scale is None else scale
        factors[path] = (down[0].detach().cpu().clone(), up[0].detach().cpu().clone(), held)
        if isinstance(mixture.router, SigmoidGate):
            gates[path] = mixture.router.gate[0].detach().float().cpu().clone()
    return Trained(factors=factors, gates=gates or None)


def _float32(factor: tuple[Tensor, Tensor, float]) -> tuple[Tensor, Tensor, float]:
    down, up, scale = factor
    return down.float(), up.float(), scale


def _device(backbone: nn.Module, path: str) -> torch.device:
    return next(backbone.get_submodule(path).parameters()).device
