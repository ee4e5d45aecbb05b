"""A mixture joins a base, a router and experts at one site of a backbone."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from mixwright.composition.channel import Channel
from mixwright.composition.entry import Carried
from mixwright.experts.base import AbstractExperts
from mixwright.routers.base import AbstractRouter
from mixwright.routers.retriever import AbstractRetriever
from mixwright.routing import Routing
from mixwright.sites import linear_site


class Mixture(nn.Module):
    """y = base(x) + sum_e w_e f_e(x).

    `base` may be None, where the experts are the whole layer; what stood there is kept as `replaced`, and acts only
    where the experts are disabled. What a foreign model asks of the layer that stood here (`weight`, `in_features`,
    ...) is answered by it. `entry`: the path of the layer whose input the experts read, where that is not the one that
    stands here, see `composition.entry`. `site`, `stream`, `flat`, `channel` and `replaced` are set when the mixture is
    installed; `flat` means that the backbone hands this layer its tokens without a batch axis.
    """

    def __init__(
        self, base: nn.Module | None, router: AbstractRouter, experts: AbstractExperts, entry: str = ""
    ) -> None:
        super().__init__()
        if router.num_experts != experts.num_experts:
            raise ValueError(
                f"the router chooses among {router.num_experts} experts, but there are {experts.num_experts}."
            )
        self.base = base
        self.replaced: nn.Module | None = None
        self.router = router
        self.experts = experts
        self.entry = entry
        self.carried = Carried() if entry else None
        self.site = ""
        self.stream = "decoder"
        self.flat = False
        self.channel = Channel()

    def forward(self, x: Float[Tensor, "*batch d_in"], *args: Any, **kwargs: Any) -> Float[Tensor, "*batch d_out"]:
        """Route, note the routing, apply the experts, add the base. What else a layer is called with is the base's."""
        # Asked for once: an attribute that is a module is found last, after two searches in vain.
        channel, base, modules = self.channel, self.base, self._modules
        router: Any = modules["router"]
        experts: Any = modules["experts"]
        if not channel.enabled and (bare := self.bare) is not None:
            return bare(x, *args, **kwargs)
        read = x if self.carried is None else self.carried.take()
        tokens = self._with_batch_axis(read)
        condition = channel.condition_at(self.stream) if isinstance(router, AbstractRetriever) else channel.condition
        routing = channel.override or router(tokens, condition)
        channel.note(self.site, routing)
        if base is None:
            combined = experts(tokens, routing, condition)
        else:
            out = self._with_batch_axis(base(x, *args, **kwargs))
            if self._fresh(base):
                combined = experts.onto(out, tokens, routing, condition)
            else:
                combined = out + experts(tokens, routing, condition).to(out.dtype)
        return combined.flatten(0, 1) if combined.dim() > read.dim() else combined

    def sole(self) -> int | None:
        """The expert that is the whole output here, where that is known before the input is, for a backbone that asks.

        It may then leave this mixture out, and says so by `passed_over`.
        """
        if not self.channel.enabled:
            bare: Any = self.bare
            return None if bare is None else bare.sole()
        routing = self._settled()
        return None if routing is None else self.experts.sole(routing)

    def passed_over(self) -> None:
        """Note the routing of a pass that went by because `sole` had an answer."""
        if self.channel.trace is not None and self.channel.enabled and (routing := self._settled()) is not None:
            self.channel.note(self.site, routing)

    def direct(self) -> Callable[[Tensor], Tensor] | None:
        """What a call comes to, where nobody hears of it and its routing is known, for a backbone that learns nothing.

        It holds for the pass in which it was asked for.
        """
        channel, modules = self.channel, self._modules
        router: Any = modules["router"]
        experts: Any = modules["experts"]
        if not channel.enabled or channel.trace is not None or channel.override is not None:
            return None
        if self.base is not None or self.carried is not None or self.flat:
            return None
        if _watched(self) or _watched(router) or _watched(experts):
            return None
        routing = router.fixed()
        return None if routing is None else experts.direct(routing)

    def experts_on(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*tokens d_out"]:
        """What the experts say to `x` by themselves, also where they are disabled; with a batch axis."""
        tokens, condition = self._with_batch_axis(x), self.channel.condition_at(self.stream)
        return self.experts(tokens, self.router(tokens, condition), condition)

    @property
    def bare(self) -> nn.Module | None:
        """What stood here before: the base, or what the experts replaced."""
        return self.replaced if self.base is None else self.base

    def _settled(self) -> Routing | None:
        router: Any = self._modules["router"]
        if self.base is not None or self._modules["experts"]._forward_hooks or router._forward_hooks:  # type: ignore[union-attr]
            return None
        return self.channel.override or router.settled()

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
            modules = self.__dict__.get("_modules", {})
            bare = modules.get("replaced") if modules.get("base") is None else modules["base"]
            if bare is None or name.startswith("_"):
                raise
            return getattr(bare, name)


def _watched(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
