"""What a pass of the backbone says about itself: its masks and its lengths, read off its arguments."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from mixwright.composition.channel import Channel
from mixwright.composition.memory import attach, resume
from mixwright.routing import Condition, RoutingMemory


def named_arguments(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, positional ones too, as far as the signature tells."""
    if not args:
        return dict(kwargs)
    signature = inspect.signature(forward)
    names = [name for name, p in signature.parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def begin_pass(channel: Channel, given: Condition, arguments: Mapping[str, Any], *, two_streams: bool) -> None:
    """Write the condition of a pass of the whole model: what the caller gave, with the masks of this call.

    `token_mask` covers the tokens of this call only, also where the attention mask covers cached ones too.
    """
    main = _first(arguments, ("decoder_input_ids", "decoder_inputs_embeds") if two_streams else _INPUTS)
    mask = _mask(arguments.get("decoder_attention_mask" if two_streams else "attention_mask"), main)
    channel.lengths = {} if main is None or main.dim() < 2 else {"decoder": (main.shape[0], main.shape[1])}
    encoder_mask = _boolean(arguments.get("attention_mask")) if two_streams else mask
    if two_streams:
        source = _first(arguments, _INPUTS)
        if source is not None and source.dim() >= 2:
            channel.lengths["encoder"] = (source.shape[0], source.shape[1])
    batch = _batch(arguments)
    memory = resume(arguments.values())
    memory.begin_pass(batch)
    rows = given if batch is None else given.for_batch(batch)
    channel.condition = replace(rows, token_mask=mask, encoder_mask=encoder_mask, memory=memory)


def end_pass(channel: Channel, arguments: Iterable[Any], output: Any) -> None:
    """Let what the routers remember of this pass's tokens travel with the cache, and close the memory."""
    memory = channel.condition.memory
    if memory is not None:
        if output is not None:
            attach(memory, output, arguments)
        memory.end_pass()


def begin_encoder_pass(channel: Channel, given: Condition, arguments: Mapping[str, Any]) -> None:
    """Write the condition of an encoder that is called by itself, as `generate` does."""
    source = _first(arguments, _INPUTS)
    if source is not None and source.dim() >= 2:
        channel.lengths = {"encoder": (source.shape[0], source.shape[1])}
    mask = _boolean(arguments.get("attention_mask"))
    batch = _batch(arguments)
    rows = given if batch is None else given.for_batch(batch)
    channel.condition = replace(rows, token_mask=None, encoder_mask=mask, memory=RoutingMemory(rows=batch))


_INPUTS = ("input_ids", "inputs_embeds")


def _first(arguments: Mapping[str, Any], names: tuple[str, ...]) -> Tensor | None:
    return next((v for v in (arguments.get(name) for name in names) if isinstance(v, Tensor)), None)


def _batch(arguments: Mapping[str, Any]) -> int | None:
    first = next((v for v in arguments.values() if isinstance(v, Tensor) and v.dim() > 0), None)
    return None if first is None else first.shape[0]


def _boolean(mask: Any) -> Tensor | None:
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _mask(mask: Any, main: Tensor | None) -> Tensor | None:
    whole = _boolean(mask)
    if whole is None or main is None or main.dim() < 2 or whole.shape[1] < main.shape[1]:
        return whole
    return whole[:, whole.shape[1] - main.shape[1] :]
