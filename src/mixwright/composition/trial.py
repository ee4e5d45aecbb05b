"""One expert composed alone, checked, and taken out again: does it do on this backbone what its factors say?"""

from collections.abc import Mapping

import torch
from torch import nn

from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel
from mixwright.composition.selfcheck import Factors, self_check
from mixwright.experts.lora import LoraExperts
from mixwright.routers.constant import ConstantRouter


def try_alone(backbone: nn.Module, expert: str, factors: Mapping[str, Factors]) -> None:
    """Compose `expert` at weight 1, run the self-check, and leave the backbone as it was. Raises IncompatibleExpert."""
    mixtures = {path: _mixture(backbone.get_submodule(path), found) for path, found in factors.items()}
    model = ComposedModel(backbone, mixtures, [expert])
    self_check(model, {expert: factors})  # takes the mixtures out itself where it raises
    model.remove()


def _mixture(base: nn.Module, factors: Factors) -> Mixture:
    weight = base.get_parameter("weight")
    down, up = factors.down.to(weight.dtype), factors.up.to(weight.dtype)
    experts = LoraExperts.stack([(down, up, factors.scale)], weight.device)
    return Mixture(base, ConstantRouter(torch.ones(1)).to(weight.device), experts)
