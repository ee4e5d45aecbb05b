"""Bake a routing that does not vary into plain weights: W + sum_e w_e s_e B_e A_e, and no mixture is left."""

import copy

import torch
from torch import Tensor, nn

from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel
from mixwright.experts.lora import LoraExperts
from mixwright.routing import Condition, Routing
from mixwright.sites import linear_site


def fold(model: ComposedModel, condition: Condition) -> nn.Module:
    """A copy of the backbone whose weights act as `model` does under `condition`; `model` is left as it is.

    Inside `model.only(...)` or `model.routed_by(...)` that routing is folded. Raises ValueError where a router decides
    by token, or by row of a batch with several rows: no single weight acts like that.
    """
    changes = {site: _change(site, mixture, condition) for site, mixture in model.mixtures.items()}
    backbone = copy.deepcopy(model).remove()
    with torch.no_grad():
        for site, change in changes.items():
            weight = backbone.get_submodule(site).get_parameter("weight")
            weight.copy_((weight.to(change.dtype) + change.to(weight.device)).to(weight.dtype))
    return backbone


def _change(site: str, mixture: Mixture, condition: Condition) -> Tensor:
    """The change of the weight at a site, laid out as the base stores it, in float32 or wider."""
    spec = None if mixture.base is None else linear_site(site, mixture.base)
    if spec is None or not isinstance(mixture.experts, LoraExperts):
        raise ValueError(f"{site} is no linear layer with LoRA experts; only those fold into a weight.")
    weight = mixture.base.get_parameter("weight")  # type: ignore[union-attr]
    experts = mixture.experts
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad():
        probe = torch.zeros(1, 2, spec.d_in, device=weight.device, dtype=weight.dtype)
        routing = mixture.channel.override or mixture.router(probe, condition)
        weights = _fixed(site, routing).to(wide)[experts.members] * experts.scale.to(wide)
        change = torch.einsum("e,eor,eri->oi", weights, experts.up.to(wide), experts.down.to(wide))
    return change.T if spec.transposed else change


def _fixed(site: str, routing: Routing) -> Tensor:
    dense = routing.dense()
    if dense[..., 0].numel() != 1:
        raise ValueError(
            f"the router at {site} decides anew for each token or row ({tuple(dense.shape[:-1])} choices), and no one "
            "weight acts like that. Fold a constant routing, one task (condition.task_ids with one id), or fold inside "
            "`with model.only(expert):`."
        )
    return dense.reshape(-1)
