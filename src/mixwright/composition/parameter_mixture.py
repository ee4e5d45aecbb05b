"""A mixture in parameter space joins a base, a router and changes of the base's parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from mixwright.composition.channel import Channel
from mixwright.experts.base import AbstractDeltas
from mixwright.routers.base import AbstractRouter
from mixwright.routing import Condition, Routing


class ParameterMixture(nn.Module):
    """y = base(x; theta + sum_e w_e delta_e).

    `site` and `channel` are set by the model that holds it; `site` is the name under which routings are traced.
    """

    def __init__(self, base: nn.Module, router: AbstractRouter, deltas: AbstractDeltas) -> None:
        super().__init__()
        if router.num_experts != deltas.num_experts:
            raise ValueError(
                f"the router chooses among {router.num_experts} experts, but there are {deltas.num_experts}."
            )
        self.base = base
        self.router = router
        self.experts = deltas
        self.site = "backbone"
        self.channel = Channel()

    def route(self, x: Tensor, condition: Condition) -> Routing:
        """What the router says of `x`, or what was put in its place; noted if somebody is tracing."""
        routing = self.channel.override or self.router(x, condition)
        self.channel.note(self.site, routing)
        return routing

    def weights(self, base: Mapping[str, Tensor], routing: Routing, strength: float = 1.0) -> dict[str, Tensor]:
        """The parameters that change, with `base` as theta; gradients reach router and experts."""
        return self.experts.onto(base, routing, strength)

    def weights_each(
        self, base: Mapping[str, Tensor], routings: Sequence[Routing], strength: float = 1.0
    ) -> list[dict[str, Tensor]]:
        """`weights` under each of several routings, which share what work they can."""
        return self.experts.onto_each(base, routings, strength)

    def forward(self, x: Tensor, condition: Condition, *args: Any, **kwargs: Any) -> Any:
        """Route by `x`, change the parameters, run the base on the other arguments."""
        theta = {name: parameter.detach() for name, parameter in self.base.named_parameters()}
        changed = self.weights(theta, self.route(x, condition))
        return functional_call(self.base, changed, args, kwargs)
