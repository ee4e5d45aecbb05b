"""One pass of one component, suspended wherever the hybrid takes over: at the entry of each block and at the head."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class Session:
    """Runs `model(**inputs)` up to the next of `stops` (modules), whose incoming hidden state it hands out.

    `start()` gives the first one's; `resume(h)` lets the module have `h` in its place and gives the next one's, or, at
    the end, what the model returned. Hooks are on the modules only until `close`.
    """

    def __init__(self, model: nn.Module, stops: Sequence[nn.Module], inputs: dict[str, Any]) -> None:
        import greenlet

        self._greenlet: Any = greenlet
        self._body: Any = greenlet.greenlet(lambda: model(**inputs))
        self._main: Any = greenlet.getcurrent()
        self._hooks = [module.register_forward_pre_hook(self._stop, with_kwargs=True) for module in stops]

    def start(self) -> Tensor:
        """The hidden state that comes to the first stop."""
        return self._body.switch()

    def resume(self, hidden: Tensor) -> Any:
        """What comes to the next stop when this one is given `hidden`; at the last, the model's output."""
        return self._body.switch(hidden)

    def close(self) -> None:
        """Take the hooks away and give the pass up if it is not at its end."""
        for hook in self._hooks:
            hook.remove()
        if not self._body.dead:
            self._body.throw(self._greenlet.GreenletExit)

    def _stop(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._greenlet.getcurrent() is not self._body:
            return None
        if args:
            hidden = self._main.switch(args[0])
            return (hidden, *args[1:]), kwargs
        hidden = self._main.switch(kwargs["hidden_states"])
        return args, {**kwargs, "hidden_states": hidden}
