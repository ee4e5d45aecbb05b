"""Which experts acted on each token of one text, how much they moved the model, and what it would lose without one.

Weights alone mislead: an expert with weight 0.9 whose output is tiny changes nothing. So every number here stands beside
the contribution, norm(w s B A u) / norm(W u): the length of what the expert adds, over the length of what the frozen
layer gives for the same token.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mixwright.composition.model import ComposedModel
from mixwright.evaluation.contribution import Tally, measured

_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class ActingExpert:
    """One expert on one token, over all sites that the token passes.

    `weight`: mean applied routing weight. `contribution`: mean of norm(w s B A u) / norm(W u). `share`: its part of all
    experts' contributions to this token, 0 to 1.
    """

    expert: str
    weight: float
    contribution: float
    share: float


@dataclass(frozen=True, kw_only=True)
class ExplainedToken:
    """One token: its slice of the text, who acted on it, and its loss in nats (None where the model predicts nothing).

    `text` is the exact slice, with the blanks that the tokenizer skipped before it; the slices of a stream join to the
    text. `leader` contributed most; it is the null expert where that one holds over half of the weight, and None where
    no expert acted. `margin`: the largest minus the second largest applied weight, mean over sites.
    """

    text: str
    token: str
    special: bool
    stream: str
    leader: str | None
    experts: list[ActingExpert]
    margin: float
    loss: float | None = None
    loss_backbone: float | None = None
    loss_without: float | None = None


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What happened to one text in a composed model, in plain lists.

    `tokens`: in order, stream by stream ("text", or "source" and "target"). `weight_by_depth` and
    `contribution_by_depth`: one row for each depth, one number for each expert, means over tokens and sites.
    `tails`: what follows the last token of each stream and belongs to none. `without`: the expert left out for
    `loss_without`. `composition`: method, config, backbone and experts as they are recorded.
    """

    text: str
    target: str | None
    experts: list[str]
    tokens: list[ExplainedToken]
    tails: dict[str, str]
    depths: list[str]
    weight_by_depth: list[list[float]]
    contribution_by_depth: list[list[float]]
    without: str | None
    composition: dict[str, Any] = field(default_factory=dict[str, Any])

    def led(self, expert: str) -> int:
        """How many tokens an expert leads."""
        return sum(token.leader == expert for token in self.tokens)

    def mean_loss(self, system: str = "loss") -> float | None:
        """Nats per predicted token: of the model (`loss`), `loss_backbone`, or `loss_without`; None without any."""
        values = [value for token in self.tokens if (value := getattr(token, system)) is not None]
        return sum(values) / len(values) if values else None

    def to_dict(self) -> dict[str, Any]:
        """The whole explanation as plain dictionaries and lists, for JSON."""
        return asdict(self)


def explain(
    model: ComposedModel, tokenizer: Any, text: str, *, target: str | None = None, without: str | None = None
) -> Explanation:
    """Explain one text: causal models read it, encoder-decoders read it and are given `target`, encoders have no loss.

    `without` names the expert that is left out for the counterfactual loss, masked before the choice as if it was not
    in the pool; None takes the one that leads most tokens. Raises ValueError for an empty text, for one that is longer
    than the backbone takes, and for a `target` that the backbone has no decoder for.
    """
    if without is not None:
        model.index(without)
    streams = _read(model, tokenizer, text, target)
    inputs = _inputs(model, streams)
    with _evaluating(model), torch.no_grad():
        tally, output = measured(model, {name: len(stream.ids) for name, stream in streams.items()}, inputs)
        leaders = {name: tally.leaders(name) for name in streams}
        losses = {"loss": _losses(model, streams, output)}
        if losses["loss"]:
            with model.disabled():
                losses["loss_backbone"] = _losses(model, streams, model(**inputs))
            left_out = without or _most_frequent(model, [leader for each in leaders.values() for leader in each])
            if left_out is not None:
                with leaving_out(model, left_out):
                    losses["loss_without"] = _losses(model, streams, model(**inputs))
            without = left_out
    return Explanation(
        text=text,
        target=target,
        experts=list(model.experts),
        tokens=[
            token for name, stream in streams.items() for token in _tokens(model, name, stream, tally, losses)
        ],
        tails={name: stream.tail for name, stream in streams.items()},
        depths=tally.depths,
        weight_by_depth=tally.weight_by_depth(),
        contribution_by_depth=tally.contribution_by_depth(),
        without=without if "loss_without" in losses else None,
        composition=asdict(model.composition),
    )


@contextmanager
def leaving_out(model: ComposedModel, expert: str) -> Iterator[None]:
    """Inside the block no router can choose `expert`: its score is masked before the choice."""
    index = model.index(expert)
    masks = [mixture.router.allowed for mixture in model.mixtures.values() if hasattr(mixture.router, "allowed")]
    before = [mask.clone() for mask in masks]  # type: ignore[union-attr]
    try:
        for mask in masks:
            mask[index] = False  # type: ignore[index]
        yield
    finally:
        for mask, kept in zip(masks, before, strict=True):
            mask.copy_(kept)  # type: ignore[union-attr]


@dataclass(frozen=True)
class _Stream:
    """The tokens of one text, with the slice of the text that each stands for."""

    ids: list[int]
    mask: list[int]
    types: list[int] | None
    names: list[str]
    pieces: list[str]
    special: list[bool]
    tail: str


def _read(model: ComposedModel, tokenizer: Any, text: str, target: str | None) -> dict[str, _Stream]:
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


def _stream(tokenizer: Any, text: str, as_target: bool = False) -> _Stream:
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(**{"text_target" if as_target else "text": text}, return_offsets_mapping=fast)
    ids = list(encoded["input_ids"])
    special = set(tokenizer.all_special_ids)
    if fast:
        pieces, tail = _slices(text, encoded["offset_mapping"])
    else:
        starts = [tokenizer.decode(ids[:end]) for end in range(len(ids) + 1)]
        pieces, tail = [b[len(a) :] for a, b in zip(starts, starts[1:], strict=False)], ""
    return _Stream(
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


def _inputs(model: ComposedModel, streams: dict[str, _Stream]) -> dict[str, Tensor]:
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


def _losses(model: ComposedModel, streams: dict[str, _Stream], output: Any) -> dict[str, list[float | None]]:
    """Cross-entropy of each token of each stream that the model predicts, in nats."""
    if "target" in streams:
        ids, logits, first = streams["target"].ids, output.logits[0], []
    elif "text" in streams and _predicts_next(model.backbone) and len(streams["text"].ids) > 1:
        ids, logits, first = streams["text"].ids[1:], output.logits[0, :-1], [None]
    else:
        return {}
    wanted = torch.tensor(ids, device=logits.device)
    values = nn.functional.cross_entropy(logits.float(), wanted, reduction="none")
    return {"target" if "target" in streams else "text": [*first, *values.tolist()]}


def _predicts_next(backbone: nn.Module) -> bool:
    can_generate = getattr(backbone, "can_generate", None)
    return bool(can_generate and can_generate())


def _most_frequent(model: ComposedModel, leaders: Sequence[int | None]) -> str | None:
    counts = [leaders.count(expert) for expert in range(len(model.experts))]
    return model.experts[counts.index(max(counts))] if any(counts) else None


def _tokens(
    model: ComposedModel, name: str, stream: _Stream, tally: Tally, losses: dict[str, dict[str, list[float | None]]]
) -> Iterator[ExplainedToken]:
    leaders, margins = tally.leaders(name), tally.margins(name)
    weights, contributions = tally.weights(name), tally.contributions(name)
    for position, piece in enumerate(stream.pieces):
        leader = leaders[position]
        of_token = {system: found[name][position] for system, found in losses.items() if name in found}
        yield ExplainedToken(
            text=piece,
            token=stream.names[position],
            special=stream.special[position],
            stream=name,
            leader=None if leader is None else model.experts[leader],
            experts=_acting(model.experts, weights[position], contributions[position]),
            margin=margins[position],
            **of_token,
        )


def _acting(experts: Sequence[str], weights: Sequence[float], contributions: Sequence[float]) -> list[ActingExpert]:
    """The experts that act on a token, the largest contribution first."""
    total = sum(contributions)
    order = sorted(range(len(experts)), key=lambda expert: (-contributions[expert], -weights[expert], expert))
    return [
        ActingExpert(
            expert=experts[expert],
            weight=weights[expert],
            contribution=contributions[expert],
            share=contributions[expert] / total if total > 0 else 0.0,
        )
        for expert in order[:_SHOWN]
        if weights[expert] > 0
    ]


@contextmanager
def _evaluating(model: ComposedModel) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
