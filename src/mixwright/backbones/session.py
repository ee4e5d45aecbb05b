"""A pass of a hybrid: each component goes through its own forward, suspended where a block begins and at its head."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from mixwright.backbones.coroutine import AbstractCoroutine
from mixwright.backbones.parts import hidden_of

if TYPE_CHECKING:
    from mixwright.backbones.hybrid import HybridBackbone
    from mixwright.backbones.hybrid_cache import HybridCache


class Session:
    """One component's pass. Masks, positions, caches, norms and logits are its own; only hidden states are exchanged.

    `stops` are the modules at whose entry it stops: `at` counts them, -1 before the start, and `hidden` is what stands
    there. `output` is what its forward returned, once it has.
    """

    def __init__(
        self,
        component: nn.Module,
        stops: tuple[nn.Module, ...],
        arguments: Mapping[str, Any],
        kind: Callable[[Callable[[], Any]], AbstractCoroutine],
    ) -> None:
        self.at = -1
        self.hidden: Tensor | None = None
        self.output: Any = None
        self._inside = False
        self._coroutine = kind(lambda: component(**arguments))
        self._hooks = [stop.register_forward_pre_hook(self._stop, with_kwargs=True, prepend=True) for stop in stops]

    @property
    def done(self) -> bool:
        """Whether it has run to the end, or was closed."""
        return self._coroutine.done

    def reach(self, place: int) -> Tensor:
        """The hidden state at `place`; layers before it that nobody asked for run on the component's own stream.

        Those see no gradient: what they compute is needed by masks and caches at most.
        """
        if self.at < 0 and place == 0:
            self.go(None)
        while self.at < place:
            with torch.no_grad():
                self.go(None)
        assert self.at == place and self.hidden is not None, f"stop {place} of a component that is at {self.at}"
        return self.hidden

    def go(self, x: Tensor | None) -> Any:
        """Go on with `x`, or as it is: the hidden state at the next stop, or the output of the whole forward."""
        coroutine = self._coroutine
        self._inside = True
        try:
            found = coroutine.start() if self.at < 0 else coroutine.resume(x)
        finally:
            self._inside = False
        self.at += 1
        if coroutine.done:
            self.output, self.hidden = found, None
        else:
            self.hidden = found
        return found

    def finish(self) -> None:
        """Run what is left, without gradient, so that its cache sees these tokens in every layer."""
        with torch.no_grad():
            while not self._coroutine.done:
                self.go(None)

    def close(self) -> None:
        """Take the hooks out and leave the forward where it is."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if not self._coroutine.done:
            self._coroutine.close()
        self.hidden = None

    def _stop(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._inside:
            return None  # another component's pass through a module that both hold
        own, name = hidden_of(args, kwargs)
        x = self._coroutine.hand_over(own)
        if x is None or x is own:
            return None
        return ((x, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: x})


class Pass:
    """The sessions of one pass of a hybrid, by component. A component has none before it is asked for.

    `given`: the arguments of every component that takes them; `ids` among them are on the device of the stream.
    """

    def __init__(
        self, hybrid: "HybridBackbone", ids: Tensor, given: Mapping[str, Tensor | None], cache: "HybridCache | None"
    ) -> None:
        self.hybrid, self.ids, self.cache = hybrid, ids, cache
        self.given: dict[str, Tensor | None] = {"input_ids": ids, **given}
        self.sessions: dict[int, Session] = {}
        self.device, self.last, self.widths = ids.device, hybrid.num_blocks, hybrid.widths

    def run(self, number: int, component: int, hidden: Tensor | None) -> Tensor:
        """See `hybrid.Slot.run`."""
        session = self.sessions.get(component)
        if session is None:
            session = self.sessions[component] = self._session(component)
        if number == 0:
            return self._out(component, session.reach(0))
        place = self.hybrid.places[component][number]
        if place is None or session.at != place:
            session.reach(self.hybrid.place(component, number))
        own = session.hidden
        assert own is not None
        out = session.go(own if hidden is None else _like(hidden, own))
        return self._out(component, out) if number <= self.last else self.logits(out)

    def whole(self, component: int, logits_to_keep: int | Tensor) -> Tensor:
        """The logits of a component that nobody interferes with: its forward in one go."""
        model, parts = self.hybrid.components[component], self.hybrid.parts[component]
        arguments = self._arguments(component, model)
        if "logits_to_keep" in parts.takes:
            return self.logits(model(**arguments, logits_to_keep=logits_to_keep))
        return kept(self.logits(model(**arguments)), logits_to_keep)

    def logits(self, output: Any) -> Tensor:
        """Those of a component's output that are tokens of the hybrid, on the device of the stream."""
        found = output.logits if hasattr(output, "logits") else output[0]
        if found.shape[-1] != self.hybrid.vocab_size:
            found = found[..., : self.hybrid.vocab_size]
        return found.to(self.device)

    def finish(self) -> None:
        """Count the tokens; who reads its masks off the last layer of its cache runs to its end, others need not."""
        if self.cache is None:
            return
        for component, session in self.sessions.items():
            if not session.done and self.cache.is_recurrent(component):
                session.finish()
        self.cache.length += self.ids.shape[1]

    def close(self) -> None:
        """Leave every component as it was before the pass."""
        for session in self.sessions.values():
            session.close()

    def _out(self, component: int, hidden: Tensor) -> Tensor:
        missing = self.widths[component] - hidden.shape[-1]
        return (pad(hidden, (0, missing)) if missing else hidden).to(self.device)

    def _session(self, component: int) -> Session:
        model = self.hybrid.components[component]
        return Session(model, self.hybrid.stops(component), self._arguments(component, model), self.hybrid.coroutine)

    def _arguments(self, component: int, model: nn.Module) -> dict[str, Any]:
        parts, cache = self.hybrid.parts[component], self.cache
        there = self.hybrid.device_of(component)
        arguments: dict[str, Any] = {
            key: value.to(there) for key, value in self.given.items() if value is not None and key in parts.takes
        }
        if "use_cache" in parts.takes:
            arguments["use_cache"] = cache is not None
        if cache is None:
            return arguments
        name = self.hybrid.names[component]
        if parts.cache_name is None:
            raise ValueError(
                f"component {name!r} keeps no cache that a hybrid could carry; pass use_cache=False, as `generate` "
                "does by itself."
            )
        arguments[parts.cache_name] = cache.of(component, name, model)
        if cache.length and self.ids.shape[1] == 1 and not cache.has_attention(component):
            arguments.pop("attention_mask", None)  # padding was zeroed when it passed
        return arguments


def kept(values: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The tokens whose logits are wanted: the last few, those of a list, or all for 0."""
    if isinstance(logits_to_keep, Tensor):
        return values[:, logits_to_keep]
    return values[:, -logits_to_keep:] if logits_to_keep else values


def _like(hidden: Tensor, own: Tensor) -> Tensor:
    """As wide as the component's own hidden state, in its dtype and on its device."""
    if hidden.shape[-1] != own.shape[-1]:
        hidden = hidden[..., : own.shape[-1]]
    return hidden.to(own.device, own.dtype)
