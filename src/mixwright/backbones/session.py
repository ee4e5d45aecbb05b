"""One pass of one component through its own forward, suspended where a block begins and before its head."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mixwright.backbones.coroutine import AbstractCoroutine
from mixwright.backbones.parts import hidden_of


class Session:
    """The component computes its masks, positions, caches, norms and logits; only hidden states are exchanged.

    `entries` are the modules at whose entry it stops: `at` counts them, -1 before the start, and `hidden` is what
    stands there. `output` is what its forward returned, once `done`.
    """

    def __init__(
        self,
        component: nn.Module,
        entries: tuple[nn.Module, ...],
        arguments: Mapping[str, Any],
        kind: Callable[[Callable[[], Any]], AbstractCoroutine],
    ) -> None:
        self.entries = entries
        self.at = -1
        self.hidden: Tensor | None = None
        self.output: Any = None
        self._inside = False
        self._coroutine = kind(lambda: component(**arguments))
        self._hooks = [
            entry.register_forward_pre_hook(self._stop, with_kwargs=True, prepend=True) for entry in entries
        ]

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
