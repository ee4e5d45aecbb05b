"""Calls that are left in the middle with a value and entered again with another: greenlets, or threads without them.

A component of a hybrid runs its own forward in one, so nobody but its authors has to know how its layers are called.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import copy_context
from importlib.util import find_spec
from typing import Any

import torch

from mixwright.errors import MissingExtra

BACKENDS = ("greenlet", "thread")


class AbstractCoroutine(ABC):
    """A call of `function` that `hand_over`, called inside it, suspends. `done`: it returned, raised or was closed.

    What holds outside when it is resumed holds inside: context variables (as they were at the start), grad mode,
    inference mode, autocast.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.done = False

    @abstractmethod
    def start(self) -> Any:
        """Run up to the first `hand_over` and return its value, or to the end and return what `function` does."""

    @abstractmethod
    def resume(self, value: Any) -> Any:
        """Let the `hand_over` that suspended the call return `value`, and run on as `start` does."""

    @abstractmethod
    def hand_over(self, value: Any) -> Any:
        """Called inside: suspend the call, and return what it is resumed with."""

    @abstractmethod
    def close(self) -> None:
        """End a suspended call: its `hand_over` raises, its `finally` blocks run. One that is done stays as it is."""


class GreenletCoroutine(AbstractCoroutine):
    """On the caller's own thread, so that all of torch's modes are the caller's; a switch takes about a microsecond."""

    def __init__(self, function: Callable[[], Any]) -> None:
        from greenlet import greenlet

        super().__init__(function)
        self._inside = greenlet(self._run)
        self._inside.gr_context = copy_context()

    def start(self) -> Any:
        """See AbstractCoroutine."""
        return self._inside.switch()

    def resume(self, value: Any) -> Any:
        """See AbstractCoroutine."""
        return self._inside.switch(value)

    def hand_over(self, value: Any) -> Any:
        """See AbstractCoroutine."""
        outside = self._inside.parent
        assert outside is not None
        return outside.switch(value)

    def close(self) -> None:
        """See AbstractCoroutine."""
        self._inside.throw()  # GreenletExit, which does not leave the greenlet
        self.done = True

    def _run(self) -> Any:
        try:
            return self.function()
        finally:
            self.done = True


class ThreadCoroutine(AbstractCoroutine):
    """On a thread of its own that runs only while the caller waits for it.

    Modes of torch that live on a thread and are not named above, such as a FlopCounterMode, do not reach inside.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(function)
        self._enter, self._leave = threading.Semaphore(0), threading.Semaphore(0)
        self._value: Any = None
        self._error: BaseException | None = None
        self._running = self._closing = self._grad = False
        self._modes = _modes()
        self._thread = threading.Thread(target=copy_context().run, args=(self._run,), daemon=True)

    def start(self) -> Any:
        """See AbstractCoroutine."""
        self._grad = torch.is_grad_enabled()
        self._running = True
        self._thread.start()
        return self._wait()

    def resume(self, value: Any) -> Any:
        """See AbstractCoroutine."""
        self._value, self._grad = value, torch.is_grad_enabled()
        self._running = True
        self._enter.release()
        return self._wait()

    def hand_over(self, value: Any) -> Any:
        """See AbstractCoroutine."""
        self._value = value
        self._leave.release()
        self._enter.acquire()
        if self._closing:
            raise _Closed
        torch.set_grad_enabled(self._grad)
        value, self._value = self._value, None
        return value

    def close(self) -> None:
        """See AbstractCoroutine."""
        if self._thread.ident is None:
            self.done = True
            return
        if self._running:  # the caller was interrupted while it waited
            self._leave.acquire()
        if not self.done:
            self._closing = True
            self._enter.release()
        self._thread.join()

    def _wait(self) -> Any:
        self._leave.acquire()
        self._running = False
        value, self._value = self._value, None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return value

    def _run(self) -> None:
        try:
            with ExitStack() as modes:
                for mode in self._modes:
                    modes.enter_context(mode())
                torch.set_grad_enabled(self._grad)
                self._value = self.function()
        except _Closed:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.done = True
            self._leave.release()


class _Closed(BaseException):
    """Ends a call that nobody resumes."""


def coroutine_type(backend: str | None = None) -> type[AbstractCoroutine]:
    """The class for `backend`, one of BACKENDS; None: greenlets where they are installed, else threads.

    Raises ValueError for another name, MissingExtra for greenlets that are not installed.
    """
    if backend not in (None, *BACKENDS):
        raise ValueError(f"coroutine back-end {backend!r}; expected one of {', '.join(BACKENDS)}, or None.")
    installed = find_spec("greenlet") is not None
    if backend == "greenlet" and not installed:
        raise MissingExtra("manticore", "running components in greenlets rather than threads")
    return ThreadCoroutine if backend == "thread" or not installed else GreenletCoroutine


def _modes() -> list[Callable[[], Any]]:
    """What opens on another thread the modes that this one is in, but for the grad mode."""
    inference = torch.is_inference_mode_enabled()
    found: list[Callable[[], Any]] = [lambda: torch.inference_mode(inference)]
    caching = torch.is_autocast_cache_enabled()
    kinds = ["cpu"]
    if torch.cuda.is_initialized():
        kinds.append("cuda")
        stream = torch.cuda.current_stream()
        found.append(lambda: torch.cuda.stream(stream))
    for kind in kinds:
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            found.append(lambda kind=kind, dtype=dtype: torch.autocast(kind, dtype, cache_enabled=caching))
    return found
