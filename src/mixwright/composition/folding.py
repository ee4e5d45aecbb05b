"""What a routing that does not vary makes of each site's weight: an exact low-rank update, apart or baked in.

Experts that combine outputs give W + sum_e w_e s_e B_e A_e; experts that combine parameters W + B_w A_w / rank.
"""

import copy

import torch
from torch import Tensor, nn

from mixwright.catalog.adapter import LoraFactors
from mixwright.composition.eval_mode import eval_mode
from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel
from mixwright.experts.factored import AbstractFactored
from mixwright.experts.lora import LoraExperts
from mixwright.routing import Condition, Routing
from mixwright.sites import linear_site


def fold(model: ComposedModel, condition: Condition) -> nn.Module:
    """A copy of the backbone whose weights act as `model` does in evaluation under `condition`; `model` is left as is.

    Inside `model.only(...)` or `model.routed_by(...)` that routing is folded. Raises ValueError where a router decides
    by token, or by row of a batch with several rows: no single weight acts like that.
    """
    changes = updates(model, condition)
    backbone = copy.deepcopy(model).remove()
    _check_unshared(backbone, changes)
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
        return _stacked(experts, _one_choice(site, routing, 0).reshape(-1), wide)
    positions = experts.positions if routing.weights.dim() > 1 else None
    choice = _one_choice(site, routing, 0 if positions is None else 1)
    down, up = experts.factors(choice)
    return LoraFactors(down[0].to(wide), up[0].T.to(wide), 1 / experts.rank)


def _stacked(experts: LoraExperts, weights: Tensor, wide: torch.dtype) -> LoraFactors:
    """sum_e w_e s_e B_e A_e as one product: the factors of all members side by side."""
    strength = weights.to(wide)[experts.members] * experts.scale.to(wide)
    down = experts.down.to(wide).flatten(0, 1)
    up = torch.einsum("e,eor->oer", strength, experts.up.to(wide)).flatten(1)
    return LoraFactors(down, up, 1.0)


def _one_choice(site: str, routing: Routing, position_axes: int) -> Tensor:
    """The one row of weights of a routing, `(1, [positions,] experts)`."""
    dense = routing.dense()
    decision = dense.shape[: dense.dim() - 1 - position_axes]
    if decision.numel() != 1:
        raise ValueError(
            f"the router at {site} decides anew for each token or row ({tuple(decision)} choices), and no one "
            "weight acts like that. Fold a constant routing, one task (condition.task_ids with one id), or fold inside "
            "`with model.only(expert):`."
        )
    return dense.reshape(1, *dense.shape[len(decision) :])


def _check_unshared(backbone: nn.Module, sites: dict[str, LoraFactors]) -> None:
    """A weight that another module uses too (tied embeddings) would change there as well."""
    owners: dict[int, set[str]] = {}
    for path, module in backbone.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(path)
    for site in sites:
        others = owners[id(backbone.get_submodule(site).get_parameter("weight"))] - {site}
        if others:
            raise ValueError(
                f"the weight at {site} is also that of {min(others)}, so no change of it acts at one place alone. "
                "Keep the experts apart (export them as a LoRA), or compose without that site."
            )

