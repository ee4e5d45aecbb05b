"""What a routing that does not vary makes of each site's weight: an exact low-rank update, apart or baked in.

Experts that combine outputs give W + sum_e w_e s_e B_e A_e; experts that combine parameters W + B_w A_w / rank.
"""

import copy

import torch
from torch import Tensor, nn

from mixwright.backbones.eval_mode import eval_mode
from mixwright.catalog.adapter import LoraFactors
from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel
from mixwright.experts.factored import AbstractFactored
from mixwright.experts.lora import LoraExperts
from mixwright.routing import Condition
from mixwright.sites import linear_site


def fold(model: ComposedModel, condition: Condition) -> nn.Module:
    """A copy of the backbone whose weights act as `model` does in evaluation under `condition`; `model` is left as is.

    Inside `model.only(...)` or `model.routed_by(...)` that routing is folded. Raises ValueError where a router decides
    by token, or by row of a batch with several rows: no single weight acts like that.
    """
    changes = updates(model, condition)
    backbone = copy.deepcopy(model).remove()
    with torch.no_grad():
        for site, change in changes.items():
            base = backbone.get_submodule(site)
            weight, spec = base.get_parameter("weight"), linear_site(site, base)
            product = (change.scale * change.up @ change.down).to(weight.device)
            laid_out = product.T if spec is not None and spec.transposed else product
            weight.copy_((weight.to(laid_out.dtype) + laid_out).to(weight.dtype))
    return backbone


def updates(model: ComposedModel, condition: Condition) -> dict[str, LoraFactors]:
    """The change of each site's weight under a routing that does not vary, as factors in float32 or wider.

    The rank is that of the experts where they combine parameters, and the sum of their ranks where they combine
    outputs. Raises ValueError as `fold`.
    """
    with eval_mode(model):
        return {site: _update(site, mixture, condition) for site, mixture in model.mixtures.items()}


def _update(site: str, mixture: Mixture, condition: Condition) -> LoraFactors:
    spec = None if mixture.base is None else linear_site(site, mixture.base)
    experts = mixture.experts
    if mixture.base is None or spec is None or not isinstance(experts, (LoraExperts, AbstractFactored)):
        raise ValueError(f"{site} is no linear layer with low-rank experts; only those fold into a weight.")
    weight = mixture.base.get_parameter("weight")
    wide = torch.promote_types(weight.dtype, torch.float32)
    probe = torch.zeros(1, 2, spec.d_in, device=weight.device, dtype=weight.dtype)
    routing = mixture.channel.override or mixture.router(probe, condition)
    if isinstance(experts, LoraExperts):
        return _stacked(experts, _one_choice(site, routing.dense(), 0).reshape(-1), wide)
    down, up = experts.factors(_one_choice(site, experts.weights(routing, probe.dim()), probe.dim() - 1))
    return LoraFactors(down[0].to(wide), up[0].T.to(wide), 1 / experts.rank)


def _stacked(experts: LoraExperts, weights: Tensor, wide: torch.dtype) -> LoraFactors:
    """sum_e w_e s_e B_e A_e as one product: the factors of all members side by side."""
    strength = weights.to(wide)[experts.members] * experts.scale.to(wide)
    down = experts.down.to(wide).flatten(0, 1)
    up = torch.einsum("e,eor->oer", strength, experts.up.to(wide)).flatten(1)
    return LoraFactors(down, up, 1.0)


def _one_choice(site: str, weights: Tensor, axes: int) -> Tensor:
    """The one row of weights, `(1, [positions,] experts)`, of a routing with so many decision axes; 0: all but one."""
    decision = weights.shape[: axes or -1]
    if decision.numel() != 1:
        raise ValueError(
            f"the router at {site} decides anew for each token or row ({tuple(decision)} choices), and no one "
            "weight acts like that. Fold a constant routing, one task (condition.task_ids with one id), or fold inside "
            "`with model.only(expert):`."
        )
    return weights.reshape(1, *weights.shape[len(decision) :])
