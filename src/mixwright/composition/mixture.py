"""A mixture joins a base, a router and experts at one site of a backbone."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from mixwright.composition.channel import Channel
from mixwright.experts.base import AbstractExperts
from mixwright.routers.base import AbstractRouter
from mixwright.sites import linear_site


class Mixture(nn.Module):
    """y = base(x) + sum_e w_e f_e(x).

    `base` may be None, where the experts are the whole layer. What a foreign model asks of the layer that stood here
    (`weight`, `in_features`, ...) is answered by the base. `site`, `stream`, `flat` and `channel` are set when the
    mixture is installed; `flat` means that the backbone hands this layer its tokens without a batch axis.
    """

    def __init__(self, base: nn.Module | None, router: AbstractRouter, experts: AbstractExperts) -> None:
        super().__init__()
        if router.num_experts != experts.num_experts:
            raise ValueError(
                f"the router chooses among {router.num_experts} experts, but there are {experts.num_experts}."
            )
        self.base = base
        self.router = router
        self.experts = experts
        self.site = ""
        self.stream = "decoder"
        self.flat = False
        self.channel = Channel()

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Route, note the routing, apply the experts, add the base."""
        # Asked for once: an attribute that is a module is found last, after two searches in vain.
        channel, base, router, experts = self.channel, self.base, self.router, self.experts
        if not channel.enabled and base is not None:
            return base(x)
        tokens = self._with_batch_axis(x)
        condition = channel.condition
        routing = channel.override or router(tokens, condition)
        channel.note(self.site, routing)
        if base is None:
            combined = experts(tokens, routing, condition)
        else:
            out = self._with_batch_axis(base(x))
            if self._fresh(base):
                combined = experts.onto(out, tokens, routing, condition)
            else:
                combined = out + experts(tokens, routing, condition).to(out.dtype)
        return combined.flatten(0, 1) if combined.dim() > x.dim() else combined

    def _fresh(self, base: nn.Module) -> bool:
        """Whether what the base returned is nobody else's: a linear layer's own result, which no hook has seen."""
        return not base._forward_hooks and (isinstance(base, nn.Linear) or linear_site("", base) is not None)

    def _with_batch_axis(self, x: Tensor) -> Tensor:
        lengths = self.channel.lengths.get(self.stream) if self.flat else None
        if lengths is None or x.dim() != 2 or x.shape[0] != lengths[0] * lengths[1]:
            return x
        return x.unflatten(0, lengths)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base")
            if base is None or name.startswith("_"):
                raise
            return getattr(base, name)
