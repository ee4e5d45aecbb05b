"""A frozen backbone with mixtures at its sites, as one model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mixwright.composition.channel import Channel
from mixwright.composition.mixture import Mixture
from mixwright.composition.surgery import freeze, install, uninstall
from mixwright.experts.base import AbstractExperts
from mixwright.routers.base import AbstractRouter
from mixwright.routing import Condition, Routing, RoutingMemory


@dataclass(frozen=True, kw_only=True)
class Composition:
    """What a composed model is made of, in words that can be written down: the content of `composition.yaml`."""

    method: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    backbone: Mapping[str, Any] = field(default_factory=dict)
    experts: Sequence[Mapping[str, Any]] = ()


class ComposedModel(nn.Module):
    """The backbone's own `forward` and `generate`, with experts acting at its sites.

    The backbone's parameters are frozen. One forward at a time for each instance: the condition and the trace of the
    current pass live in a channel that the mixtures share. Whatever is not found here is asked of the backbone.
    """

    def __init__(
        self,
        backbone: nn.Module,
        mixtures: Mapping[str, Mixture],
        experts: Sequence[str],
        composition: Composition | None = None,
    ) -> None:
        super().__init__()
        freeze(backbone)
        self.backbone = backbone
        self.experts = tuple(experts)
        self.composition = composition or Composition()
        self.channel = Channel()
        self._sites = tuple(mixtures)
        self._given: Condition | None = None
        install(backbone, mixtures, self.channel)
        self._hooks = [backbone.register_forward_pre_hook(self._begin_pass, with_kwargs=True)]

    @property
    def mixtures(self) -> dict[str, Mixture]:
        """Site path -> mixture, in the backbone's order."""
        return {site: self.backbone.get_submodule(site) for site in self._sites}  # type: ignore[misc]

    def forward(self, *args: Any, condition: Condition | None = None, **kwargs: Any) -> Any:
        """One pass of the backbone under `condition`; returns what the backbone returns."""
        with self._under(condition):
            return self.backbone(*args, **kwargs)

    def generate(self, *args: Any, condition: Condition | None = None, **kwargs: Any) -> Any:
        """The backbone's `generate` under `condition`: greedy, beams, sampling, with its cache."""
        with self._under(condition):
            return self.backbone.generate(*args, **kwargs)  # type: ignore[operator]

    @contextmanager
    def _under(self, condition: Condition | None) -> Iterator[None]:
        before, self._given = self._given, condition or self._given
        try:
            yield
        finally:
            self._given = before
            self.channel.condition = Condition()

    def _begin_pass(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask, decoder_mask = _boolean(kwargs.get("attention_mask")), _boolean(kwargs.get("decoder_attention_mask"))
        two_streams = getattr(getattr(self.backbone, "config", None), "is_encoder_decoder", False)
        condition = replace(
            self._given or Condition(),
            token_mask=decoder_mask if two_streams else mask,
            encoder_mask=mask if two_streams else None,
            memory=RoutingMemory(),
        )
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        self.channel.condition = condition if first is None else condition.for_batch(first.shape[0])

    @contextmanager
    def trace(self) -> Iterator[dict[str, list[Routing]]]:
        """Collects every routing made inside the block: site path -> one routing for each pass."""
        before, self.channel.trace = self.channel.trace, {}
        try:
            yield self.channel.trace
        finally:
            self.channel.trace = before

    @contextmanager
    def routed_by(self, routing: Routing) -> Iterator[None]:
        """Inside the block every site follows `routing`, whatever its router would say."""
        before, self.channel.override = self.channel.override, routing
        try:
            yield
        finally:
            self.channel.override = before

    def only(self, expert: str) -> Any:
        """Inside the block one expert acts everywhere, at weight 1."""
        weights = torch.zeros(len(self.experts), device=self.backbone.device if hasattr(self.backbone, "device") else None)
        weights[self.index(expert)] = 1.0
        return self.routed_by(Routing(weights[None], len(self.experts), None))

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside the block the model is its backbone, bit for bit."""
        before, self.channel.enabled = self.channel.enabled, False
        try:
            yield
        finally:
            self.channel.enabled = before

    @contextmanager
    def replaced(
        self,
        routers: Mapping[str, AbstractRouter] | None = None,
        experts: Mapping[str, AbstractExperts] | None = None,
    ) -> Iterator[None]:
        """Inside the block the named sites use other routers, or other experts: one backbone, many systems."""
        mixtures = self.mixtures
        before = {site: (mixture.router, mixture.experts) for site, mixture in mixtures.items()}
        try:
            for site, router in (routers or {}).items():
                mixtures[site].router = router
            for site, members in (experts or {}).items():
                mixtures[site].experts = members
            yield
        finally:
            for site, (router, members) in before.items():
                mixtures[site].router, mixtures[site].experts = router, members

    def index(self, expert: str) -> int:
        """The pool id of an expert."""
        if expert not in self.experts:
            raise ValueError(f"no expert {expert!r} in this model; it has {', '.join(self.experts)}.")
        return self.experts.index(expert)

    def added_state(self) -> dict[str, Tensor]:
        """Every tensor that is not the backbone's, by `<site>.router...` and `<site>.experts...`."""
        return {
            f"{site}.{part}.{name}": tensor
            for site, mixture in self.mixtures.items()
            for part in ("router", "experts")
            for name, tensor in getattr(mixture, part).state_dict().items()
        }

    def remove(self) -> nn.Module:
        """Take every mixture out and return the backbone as it was."""
        for hook in self._hooks:
            hook.remove()
        uninstall(self.backbone, self.mixtures)
        return self.backbone

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            backbone = self.__dict__.get("_modules", {}).get("backbone")
            if backbone is None:
                raise
            return getattr(backbone, name)


def _boolean(mask: Any) -> Tensor | None:
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
