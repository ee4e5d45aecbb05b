"""Hear what a hybrid's components are given and what they say at one slot, while a pass goes through it."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from mixwright.composition.mixture import Mixture

Hear = Callable[[int, Tensor | None, Tensor], None]
"""(component, the hidden state that it was given, what left its part of the slot)."""


@contextmanager
def listening(mixture: Mixture, hear: Hear) -> Generator[None]:
    """Inside the block `hear` is told of every component that runs at the slot of `mixture`.

    The hook on the mixture does nothing but be there: a pass is never led past a slot that somebody watches.
    """
    experts: Any = mixture.experts
    run: Callable[[int, Tensor | None], Tensor] = experts.run

    def heard(component: int, hidden: Tensor | None = None) -> Tensor:
        out = run(component, hidden)
        hear(component, hidden, out)
        return out

    watched = mixture.register_forward_hook(_nothing)
    experts.run = heard
    try:
        yield
    finally:
        experts.run = run
        watched.remove()


def _nothing(*_: object) -> None:
    return None
