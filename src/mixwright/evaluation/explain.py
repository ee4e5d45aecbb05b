"""Which experts acted on each token of one text, how much they moved the model, and what it would lose without one.

Weights alone mislead: an expert with weight 0.9 whose output is tiny changes nothing. So each weight here stands beside
a contribution, norm(w s B A u) / norm(W u): the length of what the expert adds, over the length of what the frozen
layer gives for the same token.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from mixwright.backbones.eval_mode import eval_mode
from mixwright.catalog.card import RESERVED
from mixwright.composition.model import ComposedModel
from mixwright.evaluation.contribution import Tally, measured
from mixwright.evaluation.hybrid_rows import mixes_models
from mixwright.evaluation.reading import Stream, inputs_of, read
from mixwright.evaluation.task_routing import is_task_routed

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
    in the pool; None takes the one that leads most tokens, where the routers can leave one out. Raises ValueError for
    an empty text, for one that is longer than the backbone takes, for a `target` without a decoder to give it to, and
    for a model routed by task, which has no choice to explain token by token.
    """
    if is_task_routed(model):
        raise ValueError(
            "this model is routed by task: every token of a text gets the same latent experts. Leave out the text; "
            "`mixwright explain FOLDER` shows which task uses which."
        )
    if mixes_models(model):
        raise ValueError(
            "this model is a hybrid of whole models, with no backbone beside them; explain_hybrid measures it on texts."
        )
    if without is not None:
        model.index(without)
    streams = read(model, tokenizer, text, target)
    inputs = inputs_of(model, streams)
    with eval_mode(model):
        tally, output = measured(model, {name: len(stream.ids) for name, stream in streams.items()}, inputs)
        leaders = {name: tally.leaders(name) for name in streams}
        losses = {"loss": token_losses(model, streams, output)}
        if losses["loss"]:
            with model.disabled():
                losses["loss_backbone"] = token_losses(model, streams, model(**inputs))
            without = without or _most_frequent(model, [leader for each in leaders.values() for leader in each])
            if without is not None:
                with leaving_out(model, without):
                    losses["loss_without"] = token_losses(model, streams, model(**inputs))
    return Explanation(
        text=text,
        target=target,
        experts=list(model.experts),
        tokens=[token for name, stream in streams.items() for token in _tokens(model, name, stream, tally, losses)],
        tails={name: stream.tail for name, stream in streams.items()},
        depths=tally.depths,
        weight_by_depth=tally.weight_by_depth(),
        contribution_by_depth=tally.contribution_by_depth(),
        without=without if "loss_without" in losses else None,
        composition=described(model),
    )


@contextmanager
def leaving_out(model: ComposedModel, expert: str) -> Generator[None]:
    """Inside the block no router can choose `expert`: its score is masked before the choice, as if it was not in the
    pool. Raises ValueError for the null expert, and where a router weighs all experts without choosing."""
    before = model.active
    model.index(expert)
    if expert == RESERVED:
        raise ValueError(f"{expert!r} is the choice of no expert at all and can't be left out; name an expert.")
    try:
        model.set_active([other for other in before if other != expert])
        yield
    finally:
        model.set_active(None if len(before) == len(model.experts) else before)


def token_losses(model: ComposedModel, streams: dict[str, Stream], output: Any) -> dict[str, list[float | None]]:
    """Cross-entropy of each token of each stream that the model predicts, in nats; empty where it predicts none."""
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
    """The expert that leads most tokens; None where nobody leads, or where routers weigh all experts at once."""
    if any(not hasattr(mixture.router, "allowed") for mixture in model.mixtures.values()):
        return None
    counts = [leaders.count(place) * (expert != RESERVED) for place, expert in enumerate(model.experts)]
    return model.experts[counts.index(max(counts))] if any(counts) else None


def _tokens(
    model: ComposedModel, name: str, stream: Stream, tally: Tally, losses: dict[str, dict[str, list[float | None]]]
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


def described(model: ComposedModel) -> dict[str, Any]:
    """The composition as it is recorded, without the experts' lists of sites."""
    found = asdict(model.composition)
    found["experts"] = [{k: v for k, v in dict(card).items() if k != "sites"} for card in found["experts"]]
    return found
