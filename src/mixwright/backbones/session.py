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

    `stops` are the modules at whose entry it stops: `at` counts them, -1 before the start, and `hidden` is what
    stands there. `output` is what its forward returned, once `done`.
    """

    def __init__(
        self,
        component: nn.Module,
        stops: tuple[nn.Module, ...],
        arguments: Mapping[str, Any],
        kind: Callable[[Callable[[], Any]], AbstractCoroutine],
    ) -> None:
        self.stops = stops
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
            self._run(None)
        while self.at < place:
            with torch.no_grad():
                self._run(None)
        assert self.at == place and self.hidden is not None, f"entry {place} of a component that is at {self.at}"
        return self.hidden

    def advance(self, place: int, x: Tensor) -> Any:
        """Go on from `place` with `x`: the hidden state at the next entry, or the output of the whole forward."""
        own = self.reach(place)
        self._run(x if x.device == own.device and x.dtype == own.dtype else x.to(own.device, own.dtype))
        return self.output if self.done else self.hidden

    def finish(self) -> None:
        """Run what is left, without gradient, so that its cache sees these tokens in every layer."""
        with torch.no_grad():
            while not self.done:
                self._run(None)

    def close(self) -> None:
        """Take the hooks out and leave the forward where it is."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if not self._coroutine.done:
            self._coroutine.close()
        self.hidden = None

    def _run(self, x: Tensor | None) -> None:
        self._inside = True
        try:
            found = self._coroutine.start() if self.at < 0 else self._coroutine.resume(x)
        finally:
            self._inside = False
        self.at += 1
        if self._coroutine.done:
            self.output, self.hidden = found, None
        else:
            self.hidden = found

    def _stop(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._inside:
            return None  # another component's pass through a module that both hold
        own, name = hidden_of(args, kwargs)
        x = self._coroutine.hand_over(own)
        if x is None:
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

    def run(self, number: int, component: int, hidden: Tensor | None) -> Tensor:
        """See `hybrid.Slot.run`."""
        session = self.sessions.get(component)
        if session is None:
            session = self.sessions[component] = self._session(component)
        if number == 0:
            return self._out(component, session.reach(0))
        place = self.hybrid.place(component, number)
        own = session.reach(place)
        out = session.advance(place, own if hidden is None else hidden[..., : own.shape[-1]])
        if number <= self.hybrid.num_blocks:
            return self._out(component, out)
        logits = out.logits if hasattr(out, "logits") else out[0]
        return logits[..., : self.hybrid.vocab_size].to(self.ids.device)

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
        missing = self.hybrid.widths[component] - hidden.shape[-1]
        return (pad(hidden, (0, missing)) if missing else hidden).to(self.ids.device)

    def _session(self, component: int) -> Session:
        model = self.hybrid.components[component]
        arguments = self._arguments(component, model)
        return Session(model, self.hybrid.stops(component), arguments, self.hybrid.coroutine)

    def _arguments(self, component: int, model: nn.Module) -> dict[str, Any]:
        parts, name = self.hybrid.parts[component], self.hybrid.names[component]
        there = next(model.parameters()).device
        arguments: dict[str, Any] = {
            key: value.to(there) for key, value in self.given.items() if value is not None and key in parts.takes
        }
        if "use_cache" in parts.takes:
            arguments["use_cache"] = self.cache is not None
        if self.cache is None:
            return arguments
        if parts.cache_name is None:
            raise ValueError(
                f"component {name!r} keeps no cache that a hybrid could carry; pass use_cache=False, as `generate` "
                "does by itself."
            )
        arguments[parts.cache_name] = self.cache.of(component, name, model)
        if self.cache.length and self.ids.shape[1] == 1 and not self.cache.has_attention(component):
            arguments.pop("attention_mask", None)  # padding was zeroed when it passed
        return arguments
