"""One text as a model reads it: its tokens, and the slice of the text that each stands for."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixwright.composition.model import ComposedModel


@dataclass(frozen=True)
class Stream:
    """The tokens of one text, with the slice of the text that each stands for."""

    ids: list[int]
    mask: list[int]
    types: list[int] | None
    names: list[str]
    pieces: list[str]
    special: list[bool]
    tail: str


def read(model: ComposedModel, tokenizer: Any, text: str, target: str | None) -> dict[str, Stream]:
    """The streams of one pass: `text`, or `source` and, where a target is given, `target`.

    Raises ValueError for an empty text, one that is too long, and a target for a backbone without a decoder.
    """
    two = bool(getattr(getattr(model.backbone, "config", None), "is_encoder_decoder", False))
    if target is not None and not two:
        raise ValueError("target: this backbone has no decoder of its own; put the answer into the text.")
    streams = {"source" if two else "text": _stream(tokenizer, text)}
    if target is not None:
        streams["target"] = _stream(tokenizer, target, as_target=True)
    longest = getattr(getattr(model.backbone, "config", None), "max_position_embeddings", None)
    for name, stream in streams.items():
        if not stream.ids:
            raise ValueError(f"{name}: the text has no tokens; give some text to explain.")
        if longest and len(stream.ids) > longest:
            raise ValueError(f"{name}: {len(stream.ids)} tokens, but the backbone takes {longest}; shorten the text.")
    return streams


def _stream(tokenizer: Any, text: str, as_target: bool = False) -> Stream:
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(**{"text_target" if as_target else "text": text}, return_offsets_mapping=fast)
    ids = list(encoded["input_ids"])
    special = set(tokenizer.all_special_ids)
    if fast:
        pieces, tail = _slices(text, encoded["offset_mapping"])
    else:
        starts = [tokenizer.decode(ids[:end]) for end in range(len(ids) + 1)]
        pieces, tail = [b[len(a) :] for a, b in zip(starts, starts[1:], strict=False)], ""
    return Stream(
        ids=ids,
        mask=list(encoded["attention_mask"]),
        types=list(encoded["token_type_ids"]) if "token_type_ids" in encoded else None,
        names=list(tokenizer.convert_ids_to_tokens(ids)),
        pieces=pieces,
        special=[number in special for number in ids],
        tail=tail,
    )


def _slices(text: str, offsets: Sequence[tuple[int, int]]) -> tuple[list[str], str]:
    """Cuts the text where its tokens end, so that nothing is lost and nothing is shown twice.

    A character that several byte-level tokens share goes to the first of them.
    """
    pieces: list[str] = []
    cursor = 0
    for _, end in offsets:
        pieces.append(text[cursor : max(cursor, end)])
        cursor = max(cursor, end)
    return pieces, text[cursor:]


def inputs_of(model: ComposedModel, streams: dict[str, Stream]) -> dict[str, Tensor]:
    """The arguments of the backbone's forward for these streams, as a batch of one."""
    device = next(model.backbone.parameters()).device
    first = next(iter(streams.values()))
    inputs = {"input_ids": first.ids, "attention_mask": first.mask}
    accepted = inspect.signature(model.backbone.forward).parameters
    if first.types is not None and "token_type_ids" in accepted:
        inputs["token_type_ids"] = first.types
    if "target" in streams:
        inputs["labels"] = streams["target"].ids
    elif "source" in streams:
        inputs["decoder_input_ids"] = [model.backbone.config.decoder_start_token_id]  # type: ignore[union-attr]
    return {name: torch.tensor([values], device=device) for name, values in inputs.items() if name in accepted}
