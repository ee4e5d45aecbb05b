"""Gradient checkpointing runs layers again during the backward pass, when another pass may have begun since."""

from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from mixwright.composition.channel import Channel
from mixwright.routing import Condition


def checkpoint_options(channel: Channel, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of `torch.utils.checkpoint` under which a layer runs again in the condition that it first ran in.

    What is given stays. Reentrant checkpoints take no context: with those, call `backward` before the next forward.
    """
    options = {"use_reentrant": False, **(given or {})}
    if options["use_reentrant"] or "context_fn" in options:
        return options

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _again(channel, channel.condition, channel.lengths)

    return {**options, "context_fn": contexts}


@contextmanager
def _again(channel: Channel, condition: Condition, lengths: dict[str, tuple[int, int]]) -> Generator[None]:
    before = channel.condition, channel.lengths, channel.trace
    channel.condition, channel.lengths, channel.trace = condition, lengths, None
    try:
        yield
    finally:
        channel.condition, channel.lengths, channel.trace = before
