"""Ctrl-C between steps: the step that runs is finished, so that what is saved is whole."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Interruption:
    """Whether somebody asked to stop."""

    requested: bool = False


@contextmanager
def interruption(listen: bool = True) -> Generator[Interruption]:
    """Inside the block the first Ctrl-C or SIGTERM sets `requested`, and the second acts at once.

    Without `listen`, and outside the main thread, signals do what they did.
    """
    stop = Interruption()
    if not listen or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def asked(number: int, frame: Any) -> None:
        del frame
        stop.requested = True
        signal.signal(number, before[signal.Signals(number)] or signal.SIG_DFL)

    try:
        for number in before:
            signal.signal(number, asked)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
