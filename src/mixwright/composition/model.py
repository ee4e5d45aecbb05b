"""A frozen backbone with mixtures at its sites, as one model."""

import inspect
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixwright.catalog.card import RESERVED
from mixwright.composition.channel import Channel
from mixwright.composition.checkpointing import checkpoint_options
from mixwright.composition.mixture import Mixture
from mixwright.composition.passes import begin_encoder_pass, begin_pass, end_pass, named_arguments
from mixwright.composition.probe import Probe, encoder_of
from mixwright.composition.probe import probe as look
from mixwright.composition.surgery import freeze, install, uninstall
from mixwright.experts.base import AbstractExperts
from mixwright.ops.digest import fingerprint
from mixwright.routers.base import AbstractRouter
from mixwright.routers.shared import share
from mixwright.routers.token import TokenRouter
from mixwright.routing import Condition, Routing


@dataclass(frozen=True, kw_only=True)
class Composition:
    """What a composed model is made of, in words that can be written down; see `saving` for where they go.

    `config` is the method's. `backbone` has `path`, `revision`, `kind` and `architecture`. `experts` are the cards of
    the catalogue as plain data, or the models that were composed. `citation` is BibTeX. `ledger`: what is known of the
    licences of the latter, from the folder that they were loaded from.
    """

    method: str = ""
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    backbone: Mapping[str, Any] = field(default_factory=dict[str, Any])
    experts: Sequence[Mapping[str, Any]] = ()
    citation: str = ""
    ledger: Mapping[str, Any] = field(default_factory=dict[str, Any])


class ComposedModel(nn.Module):
    """The backbone's own `forward` and `generate`, with experts acting at its sites.

    The backbone's parameters are frozen. One forward at a time for each instance: the condition and the trace of the
    current pass live in a channel that the mixtures share. Whatever is not found here is asked of the backbone.
    `probe`: what is known of the sites; without it the backbone is run once to find out. Raises IncompatibleExpert for
    a site that the backbone never calls. `whole`: tensors about the model that belong to no site, saved with it.
    `tokenizer`: saved beside a model made of several, where it was given one.
    """

    def __init__(
        self,
        backbone: nn.Module,
        mixtures: Mapping[str, Mixture],
        experts: Sequence[str],
        composition: Composition | None = None,
        probe: Probe | None = None,
    ) -> None:
        super().__init__()
        self.probe = probe or look(backbone, tuple(mixtures))
        self.fingerprint = fingerprint(backbone)
        self._asked_gradient = freeze(backbone)
        self.backbone = backbone
        self.experts = tuple(experts)
        self.composition = composition or Composition()
        self.channel = Channel()
        self._sites = tuple(mixtures)
        self.whole: dict[str, Tensor] = {}
        self.tokenizer: Any = None
        self._given = Condition()
        self._in_pass = False
        self._active: tuple[str, ...] | None = None
        self._allowed: dict[str, Tensor] = {}
        for site, mixture in mixtures.items():
            mixture.stream, mixture.flat = self.probe.sites[site].stream, self.probe.sites[site].flat
        for group in self.probe.groups():
            share(router.scores for router in (mixtures[s].router for s in group) if isinstance(router, TokenRouter))
        install(backbone, mixtures, self.channel)
        self._hooks = [
            backbone.register_forward_pre_hook(self._begin_pass, with_kwargs=True, prepend=True),
            backbone.register_forward_hook(self._end_pass, with_kwargs=True, always_call=True),
        ]
        encoder = encoder_of(backbone)
        if encoder is not None:
            self._hooks.append(encoder.register_forward_pre_hook(self._begin_encoder_pass, with_kwargs=True))
        self.__dict__["forward"] = _Forward(self)

    @property
    def mixtures(self) -> dict[str, Mixture]:
        """Site path -> mixture, in the backbone's order."""
        return {site: self.backbone.get_submodule(site) for site in self._sites}  # type: ignore[misc]

    def _mixed(self) -> Mapping[str, Any]:
        """Everything with a router and experts: the mixtures at sites, or one around the whole."""
        return self.mixtures

    def forward(
        self, *args: Any, condition: Condition | None = None, task_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """One pass of the backbone under `condition`, or under one with `task_ids`; returns what the backbone returns.

        `task_ids` (batch,) is the column of a data set with which PEFT's Poly and transformers' Trainer say the task.
        """
        if condition is None and task_ids is None:
            return self.backbone(*args, **kwargs)
        with self.under(self._condition(condition, task_ids)):
            return self.backbone(*args, **kwargs)

    def generate(
        self, *args: Any, condition: Condition | None = None, task_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """The backbone's `generate` under `condition`: greedy, beams, sampling, with its cache."""
        with self.under(self._condition(condition, task_ids)):
            return self.backbone.generate(*args, **kwargs)  # type: ignore[operator]

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """As the backbone's, not reentrant unless asked; layers run again under the tasks of their own pass."""
        given = checkpoint_options(self.channel, gradient_checkpointing_kwargs)
        self.backbone.gradient_checkpointing_enable(given, **options)  # type: ignore[operator]

    def _condition(self, condition: Condition | None, task_ids: Tensor | None) -> Condition | None:
        return condition if task_ids is None else replace(condition or self._given, task_ids=task_ids)

    @contextmanager
    def under(self, condition: Condition | None) -> Generator[None]:
        """Inside the block every pass has this condition; its masks are those of each pass."""
        before, self._given = self._given, condition or self._given
        try:
            yield
        finally:
            self._given = before

    def _begin_pass(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        two_streams = getattr(getattr(backbone, "config", None), "is_encoder_decoder", False)
        arguments = named_arguments(backbone.forward, args, kwargs)
        begin_pass(self.channel, self._given, arguments, two_streams=two_streams)
        self._in_pass = True

    def _end_pass(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._in_pass = False
        end_pass(self.channel, (*args, *kwargs.values()), output)

    def _begin_encoder_pass(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._in_pass:
            begin_encoder_pass(self.channel, self._given, named_arguments(encoder.forward, args, kwargs))

    @contextmanager
    def trace(self) -> Generator[dict[str, list[Routing]]]:
        """Collects every routing made inside the block: site path -> one routing for each pass."""
        before, self.channel.trace = self.channel.trace, {}
        try:
            yield self.channel.trace
        finally:
            self.channel.trace = before

    @contextmanager
    def routed_by(self, routing: Routing) -> Generator[None]:
        """Inside the block every site follows `routing`, whatever its router would say."""
        before, self.channel.override = self.channel.override, routing
        try:
            yield
        finally:
            self.channel.override = before

    @contextmanager
    def only(self, expert: str) -> Generator[None]:
        """Inside the block one expert acts everywhere, at weight 1."""
        device = next(self.backbone.parameters(), torch.zeros(())).device
        chosen = torch.tensor([self.index(expert)], device=device)
        with self.routed_by(Routing(torch.ones(1, device=device), len(self.experts), chosen)):
            yield

    @contextmanager
    def disabled(self) -> Generator[None]:
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
    ) -> Generator[None]:
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
        """The pool id of an expert. Raises ValueError for one that is not in the model."""
        if expert not in self.experts:
            known = ", ".join(self.experts) or "none with names: its experts go by number"
            raise ValueError(f"no expert {expert!r} in this model; it has {known}.")
        return self.experts.index(expert)

    @property
    def active(self) -> tuple[str, ...]:
        """The experts that the routers may choose."""
        return self.experts if self._active is None else self._active

    @property
    def forbidden(self) -> tuple[str, ...]:
        """The backbone's parameters that a person keeps as pretrained, of models that change weights; else none."""
        return ()

    @property
    def frozen_experts(self) -> tuple[str, ...]:
        """The experts that a person keeps as they are through training, of models that can; else none."""
        return ()

    def restrain(self, forbidden: Sequence[str], frozen: Sequence[str]) -> None:
        """Forbid these parameters and freeze these experts, by their names, as they were when it was saved.

        Raises ValueError for names that are not there, and for a model that can do neither.
        """
        if forbidden or frozen:
            raise ValueError(f"{(*forbidden, *frozen)[0]!r}: this model can't forbid parameters or freeze experts.")

    def set_active(self, experts: Sequence[str] | None) -> None:
        """Let the routers choose among these experts only, until the next call; None: among all.

        The others are masked out before the choice and cannot move a bit of any output; a null expert stays. Raises
        ValueError where a router does not choose, such as a constant one.
        """
        if experts is None and not self.experts:
            return  # experts without names all act, always
        ids = [self.index(expert) for expert in (self.experts if experts is None else experts)]
        ids += [i for i, expert in enumerate(self.experts) if expert == RESERVED]
        if not ids:
            raise ValueError("set_active: no expert is left to be chosen; name one or more, or use disabled().")
        masks = {site: _masks(mixture.router) for site, mixture in self._mixed().items()}
        unmasked = [site for site, found in masks.items() if not found]
        if unmasked:
            raise ValueError(f"the router at {unmasked[0]} weighs every expert and can't leave one out.")
        for site, found in masks.items():
            for name, mask in found.items():
                whole = self._allowed.setdefault(f"{site}.router.{name}", mask.clone()).to(mask.device)
                chosen = torch.zeros_like(mask)
                chosen[ids] = True
                mask.copy_(whole & chosen)
        self._active = None if experts is None else tuple(self.experts[i] for i in sorted(set(ids)))

    def added_state(self) -> dict[str, Tensor]:
        """Every tensor that is not the backbone's, by `<site>.router...`, `<site>.experts...` and `whole...`.

        What `set_active` leaves out at the moment is in it all the same.
        """
        state: dict[str, Tensor] = {
            f"{site}.{part}.{name}": tensor
            for site, mixture in self._mixed().items()
            for part in ("router", "experts")
            for name, tensor in getattr(mixture, part).state_dict().items()
        }
        held = {name: self._allowed.get(name, tensor).to(tensor.device) for name, tensor in state.items()}
        return held | {f"whole.{name}": tensor for name, tensor in self.whole.items()}

    def acts_at(self, expert: str) -> tuple[str, ...]:
        """The sites at which an expert may act: where the router's mask, if it has one, lets it be chosen."""
        at = self.index(expert)
        masks = {site: _masks(mixture.router).values() for site, mixture in self._mixed().items()}
        return tuple(site for site, found in masks.items() if not found or any(bool(mask[at]) for mask in found))

    def kept_tensors(self) -> list[Tensor]:
        """What `save_pretrained` writes, so that it may be trained."""
        return list(self.added_state().values())

    def card_lines(self) -> list[str]:
        """What it says of itself on its card, in Markdown, where its experts are of its own making."""
        return []

    def cost_text(self) -> str:
        """What it costs to run, in lines for people who are about to train it; empty where the backbone is all."""
        return ""

    def num_added_parameters(self) -> int:
        """Numbers in the added state: factors, gates, scales, masks."""
        return sum(tensor.numel() for tensor in self.added_state().values())

    def print_trainable_parameters(self) -> None:
        """One line: trainable parameters, all parameters, and their share in percent."""
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        everything = sum(p.numel() for p in self.parameters())
        share = 100 * trainable / max(1, everything)
        print(f"trainable params: {trainable:,} || all params: {everything:,} || trainable%: {share:.4f}")

    def fold(self, condition: Condition | None = None) -> nn.Module:
        """A copy of the backbone with a routing that does not vary baked into its weights; see `folding.fold`.

        Without a `condition` that of the block around it holds, such as a task's.
        """
        from mixwright.composition.folding import fold

        return fold(self, condition or self._given)

    def remove(self) -> nn.Module:
        """Take every mixture out and return the backbone as it was, gradients asked for included."""
        for hook in self._hooks:
            hook.remove()
        uninstall(self.backbone, self.mixtures)
        for parameter in self._asked_gradient:
            parameter.requires_grad_(True)
        self._sites = ()
        return self.backbone

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the composition as a folder that `mixwright.load` reads; the backbone is named, not copied."""
        from mixwright.composition.saving import save

        save(self, Path(folder))

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Save, and upload the folder to the hub as one commit; `options` are those of `saving.push`."""
        from mixwright.composition.saving import push

        return push(self, repo_id, **options)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            backbone = self.__dict__.get("_modules", {}).get("backbone")
            if backbone is None:
                raise
            return getattr(backbone, name)


_OWN_ARGUMENTS = ("condition", "task_ids")


class _Forward:
    """A composed model's `forward` with the signature of its backbone's, by which trainers choose what to pass."""

    def __init__(self, model: ComposedModel) -> None:
        self.model = model
        own = inspect.signature(model.backbone.forward)
        extra = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in _OWN_ARGUMENTS]
        before = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        after = [p for p in own.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
        self.__signature__ = own.replace(parameters=[*before, *extra, *after])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.model).forward(self.model, *args, **kwargs)


def _masks(router: AbstractRouter) -> dict[str, Tensor]:
    return {name: mask for name, mask in router.named_buffers() if name.split(".")[-1] == "allowed"}
