"""One text through layers of retrieved neurons: who fired on which token, how sure each head was, and how evenly.

Numbers are of this text alone: for the use of a table at large run `evaluation.neuron_usage` over more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import exp
from typing import Any

import torch
from torch import Tensor, nn

from mixwright.backbones.eval_mode import eval_mode
from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel
from mixwright.evaluation.explain import described, token_losses
from mixwright.evaluation.neuron_sites import neuron_sites
from mixwright.evaluation.neurons import ActingNeuron, NeuronTrace, trace_neurons
from mixwright.evaluation.reading import Stream, inputs_of, read
from mixwright.routers.retriever import AbstractRetriever

SHOWN, BUSIEST, FIRES_ON, BINS = 4, 12, 8, 64
_STREAMS = {"encoder": "source", "decoder": "target"}


@dataclass(frozen=True, kw_only=True)
class TokenAtSite:
    """One token at one site. `neurons`: those that moved it most. `coverage`, `margin`: means over heads, None where
    they are not defined. `unsure`: the share of heads that were flagged, None where nothing flags. `dense`: the weight
    of a dense branch. `size`: the length of the layer's output."""

    neurons: list[ActingNeuron]
    coverage: float | None
    margin: float | None
    unsure: float | None
    dense: float | None
    size: float


@dataclass(frozen=True, kw_only=True)
class NeuronToken:
    """One token of the text, with its loss in nats and what happened to it; `at` has None for sites of other streams.

    `loss_without`: the loss without the retrieved neurons, where they stand beside the layers of the backbone.
    """

    text: str
    token: str
    special: bool
    stream: str
    at: list[TokenAtSite | None]
    loss: float | None = None
    loss_without: float | None = None


@dataclass(frozen=True, kw_only=True)
class HeadUse:
    """One head on this text: how many different experts it retrieved, in `slots` retrievals; means over tokens."""

    used: int
    slots: int
    coverage: float | None
    entropy: float | None
    margin: float | None
    unsure: float | None


@dataclass(frozen=True, kw_only=True)
class BusyNeuron:
    """One of the neurons that moved the text most: how often it acted, its part of all lengths, and where it fired."""

    id: int
    place: tuple[int, int]
    count: int
    share: float
    tokens: list[int]


@dataclass(frozen=True, kw_only=True)
class SiteText:
    """One site on this text. `effective`: exp of the entropy of the gate mass, the number of experts that it amounts
    to. `first`, `second`: retrievals along each axis of the grid, in at most 64 bins."""

    site: str
    stream: str
    grid: tuple[int, int]
    heads: list[HeadUse]
    used: int
    slots: int
    effective: float
    first: list[int]
    second: list[int]
    busiest: list[BusyNeuron]


@dataclass(frozen=True, kw_only=True)
class NeuronText:
    """A text explained, in plain lists. `tails`: what follows the last token of each stream."""

    text: str
    target: str | None
    tokens: list[NeuronToken]
    tails: dict[str, str]
    sites: list[SiteText]
    composition: dict[str, Any] = field(default_factory=dict[str, Any])

    def mean_loss(self, system: str = "loss") -> float | None:
        """Nats per predicted token: of the model (`loss`) or `loss_without`; None without any."""
        values = [value for token in self.tokens if (value := getattr(token, system)) is not None]
        return sum(values) / len(values) if values else None

    def to_dict(self) -> dict[str, Any]:
        """The whole of it as plain dictionaries and lists, for JSON."""
        return asdict(self)


def retrieves_neurons(model: ComposedModel) -> bool:
    """Whether some site of the model retrieves single neurons."""
    return any(isinstance(mixture.router, AbstractRetriever) for mixture in model.mixtures.values())


@torch.no_grad()
def explain_neurons(model: ComposedModel, tokenizer: Any, text: str, *, target: str | None = None) -> NeuronText:
    """Run one text and take every layer of neurons apart.

    Raises ValueError for an empty or too long text, a `target` without a decoder, and a model without such layers.
    """
    mixtures = model.mixtures
    sites = {site: mixtures[site] for site in neuron_sites(model)}
    streams = read(model, tokenizer, text, target)
    inputs = inputs_of(model, streams)
    with eval_mode(model):
        traces, output = _traced(model, sites, inputs)
        losses = {"loss": token_losses(model, streams, output)}
        if losses["loss"] and all(mixture.base is not None for mixture in model.mixtures.values()):
            with model.disabled():
                losses["loss_without"] = token_losses(model, streams, model(**inputs))
    of = {site: _stream_of(model, site, streams) for site in traces}
    kept = {site: trace for site, trace in traces.items() if of[site] in streams}
    starts = _starts(streams)
    return NeuronText(
        text=text,
        target=target,
        tokens=[token for name, stream in streams.items() for token in _tokens(name, stream, kept, of, losses)],
        tails={name: stream.tail for name, stream in streams.items()},
        sites=[_site(site, of[site], trace, starts[of[site]]) for site, trace in kept.items()],
        composition=described(model),
    )


def _traced(
    model: ComposedModel, sites: Mapping[str, Mixture], inputs: Mapping[str, Tensor]
) -> tuple[dict[str, NeuronTrace], Any]:
    """One pass, and what each site did with what it was given in it."""
    given: dict[str, Tensor] = {}

    def recorder(site: str) -> Any:
        def record(_: nn.Module, args: tuple[Any, ...]) -> None:
            given.setdefault(site, args[0].detach())

        return record

    hooks = [module.register_forward_pre_hook(recorder(site)) for site, module in sites.items()]
    try:
        output = model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        site: trace_neurons(module.router, module.experts, given[site])  # type: ignore[arg-type]
        for site, module in sites.items()
        if site in given
    }, output


def _stream_of(model: ComposedModel, site: str, streams: Mapping[str, Stream]) -> str:
    return "text" if "text" in streams else _STREAMS.get(model.probe.sites[site].stream, "")


def _starts(streams: Mapping[str, Stream]) -> dict[str, int]:
    """Stream -> the place of its first token among all."""
    starts, place = dict[str, int](), 0
    for name, stream in streams.items():
        starts[name], place = place, place + len(stream.ids)
    return starts


def _tokens(
    name: str,
    stream: Stream,
    traces: Mapping[str, NeuronTrace],
    of: Mapping[str, str],
    losses: Mapping[str, Mapping[str, Sequence[float | None]]],
) -> list[NeuronToken]:
    return [
        NeuronToken(
            text=piece,
            token=stream.names[place],
            special=stream.special[place],
            stream=name,
            at=[_at(trace, place) if of[site] == name else None for site, trace in traces.items()],
            **{system: found[name][place] for system, found in losses.items() if name in found},
        )
        for place, piece in enumerate(stream.pieces)
    ]


def _at(trace: NeuronTrace, token: int) -> TokenAtSite:
    return TokenAtSite(
        neurons=trace.token(token, SHOWN),
        coverage=_mean(trace.coverage, token),
        margin=_mean(trace.margin, token),
        unsure=_mean(trace.flagged, token),
        dense=None if trace.dense is None else float(trace.dense[token]),
        size=float(trace.outputs[token].float().norm()),
    )


def _mean(values: Tensor | None, token: int) -> float | None:
    return None if values is None else float(values[token].double().mean())


def _site(site: str, stream: str, trace: NeuronTrace, start: int) -> SiteText:
    acts = trace.gates != 0
    ids = trace.ids[acts]
    mass = torch.zeros(trace.grid[0] * trace.grid[1], dtype=torch.float64)
    mass.index_add_(0, ids.cpu(), trace.gates[acts].abs().double().cpu())
    z = mass / mass.sum().clamp_min(1e-12)
    rows, columns = ids // trace.grid[1], ids % trace.grid[1]
    return SiteText(
        site=site,
        stream=stream,
        grid=trace.grid,
        heads=[_head(trace, head) for head in range(int(trace.head.max()) + 1)],
        used=int(ids.unique().numel()),
        slots=int(acts.sum()),
        effective=exp(-float(torch.xlogy(z, z).sum())),
        first=_binned(rows, trace.grid[0]),
        second=_binned(columns, trace.grid[1]),
        busiest=_busiest(trace, start),
    )


def _head(trace: NeuronTrace, head: int) -> HeadUse:
    slots = trace.head == head
    acts = trace.gates[:, slots] != 0

    def mean(values: Tensor | None) -> float | None:
        return None if values is None else float(values[:, head].double().mean())

    return HeadUse(
        used=int(trace.ids[:, slots][acts].unique().numel()),
        slots=int(acts.sum()),
        coverage=mean(trace.coverage),
        entropy=mean(trace.entropy),
        margin=mean(trace.margin),
        unsure=mean(trace.flagged),
    )


def _binned(places: Tensor, length: int) -> list[int]:
    bins = min(BINS, length)
    return torch.bincount(places * bins // length, minlength=bins).tolist()


def _busiest(trace: NeuronTrace, start: int) -> list[BusyNeuron]:
    """The neurons with the largest sum of lengths, and the tokens on which each added most."""
    ids, slot = trace.ids.flatten().unique(return_inverse=True)
    token = torch.arange(len(trace.ids)).repeat_interleave(trace.ids.shape[1])
    norms = trace.norms.flatten().double().cpu()
    slot = slot.cpu()
    added = torch.zeros(len(ids), dtype=torch.float64).index_add_(0, slot, norms)
    counts = torch.zeros(len(ids), dtype=torch.int64).index_add_(0, slot, (trace.gates.flatten() != 0).long().cpu())
    found: list[BusyNeuron] = []
    for place in added.argsort(descending=True, stable=True)[:BUSIEST].tolist():
        if added[place] == 0:
            break
        mine = (slot == place).nonzero().flatten()
        order = mine[norms[mine].argsort(descending=True, stable=True)]
        fires = list(dict.fromkeys(token[order].tolist()))[:FIRES_ON]
        number = int(ids[place])
        found.append(
            BusyNeuron(
                id=number,
                place=divmod(number, trace.grid[1]),
                count=int(counts[place]),
                share=float(added[place] / added.sum()),
                tokens=[start + one for one in fires],
            )
        )
    return found
