"""A backbone's feed-forward layers become PEER layers, stepwise:

1. beside each layer stands one of its own neurons, with rows out of zero: neutral to the bit;
2. the neurons are clustered onto the grid, and the keys fitted to the oracle's choice on calibration text;
3. the layer is taken away; what is left of it, the neurons that always act, shrinks while the loss is watched.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mixwright.backbones.hf import provenance
from mixwright.composition.mixture import Mixture
from mixwright.composition.model import Composition
from mixwright.composition.probe import probe
from mixwright.experts.neuron import NeuronExperts
from mixwright.methods.peer.calibration import layer_inputs
from mixwright.methods.peer.config import METHOD, PeerConfig
from mixwright.methods.peer.converted import converted
from mixwright.methods.peer.feed_forward import Place, observed, places
from mixwright.methods.peer.key_fit import Found, fit_keys, measure
from mixwright.methods.peer.model import PeerComposedModel
from mixwright.methods.peer.neurons import Neurons
from mixwright.methods.peer.place_neurons import neurons_at
from mixwright.ops.digest import fingerprint
from mixwright.routers.product_key import GateName, ProductKeyRouter

HELD_OUT = 8
"""One in so many calibration tokens is not learnt from, but measured on."""
ODDS = 3.0
"""Where gates are sigmoids, a neuron that is only just chosen starts at sigmoid(3) = 0.95."""
SHARES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125, 0.0625, 0.0)


@dataclass(frozen=True)
class Shrunk:
    """One step of `Conversion.shrink`: `keep` neurons of each layer always act, and the loss is this."""

    keep: int
    loss: float


@dataclass(frozen=True)
class _Layer:
    """`neurons` stand in the order of the table; `cells` are the places that hold one. `usefulness`: mean |act| |v|."""

    place: Place
    router: ProductKeyRouter
    experts: NeuronExperts
    neurons: Neurons
    cells: Tensor
    usefulness: Tensor
    inputs: Tensor | None


class Conversion:
    """A backbone on its way: `model` is what it is at the moment. See `convert` for what is given.

    At first experts stand beside every layer and say nothing, so that the model is its backbone to the bit. `cluster`:
    neurons share sub-keys if they matter on the same calibration tokens or, as where there are none, if their rows in
    point the same way.
    """

    def __init__(
        self,
        backbone: nn.Module,
        data: Any = None,
        *,
        sites: str | Sequence[str] = "all",
        top_k: int | None = None,
        grid: tuple[int, int] | None = None,
        dim_key: int = 64,
        gate: GateName = "one",
        cluster: Literal["activity", "rows"] = "activity",
        tokens: int = 16384,
        seed: int = 0,
    ) -> None:
        chosen = observed(backbone, places(backbone, sites), alone=True)
        read = {path: neurons_at(backbone, place) for path, place in chosen.items()}
        active = _active(top_k, read)
        inputs = {} if data is None else layer_inputs(backbone, chosen, data, tokens, seed)
        options: dict[str, Any] = {"top_k": active, "grid": grid, "dim_key": dim_key, "gate": gate, "seed": seed}
        self.seed = seed
        self.layers = {
            path: _layer(chosen[path], neurons, inputs.get(path), options, cluster) for path, neurons in read.items()
        }
        grids = [layer.router.grid for layer in self.layers.values()]
        self._settings = PeerConfig(
            sites=tuple(chosen),
            num_experts=grids[0],
            heads=1,
            top_k=active,
            dim_key=dim_key,
            gate=gate,
            query_norm="none",
            query_bias=True,
            activation=_same("activations", [found.activation for found in read.values()]),
            gated=_same("numbers of rows in a neuron", [found.rows.shape[1] for found in read.values()]) == 3,
            seed=seed,
        )
        self._set_out(silent=True)
        self.model = self._composed(backbone, "parallel")

    def fit_keys(self, steps: int = 400, learning_rate: float = 1e-2) -> dict[str, Found]:
        """Keys learn the oracle's choice; path -> how well they do on calibration tokens that they did not see.

        While the layers still stand the model does not change. Raises ValueError without calibration text.
        """
        shift = 0.0 if self._settings.gate == "one" else ODDS
        for layer in self.layers.values():
            if layer.inputs is None:
                raise ValueError("data: there is no calibration text; give batches to learn the oracle's choice on.")
            mine = layer.inputs[torch.arange(len(layer.inputs)) % HELD_OUT != 0]
            learn = partial(fit_keys, steps=steps, learning_rate=learning_rate, seed=self.seed, shift=shift)
            learn(layer.router, layer.neurons, mine)
        return self.found()

    def found(self) -> dict[str, Found]:
        """Path -> how retrieval compares with the oracle on calibration tokens that keys were not fitted to."""
        return {
            path: measure(layer.router, layer.neurons, layer.inputs[::HELD_OUT])
            for path, layer in self.layers.items()
            if layer.inputs is not None
        }

    def keep(self, count: int) -> None:
        """Let the `count` most useful neurons of each layer always act, and retrieval choose among the others."""
        fewest = min(len(layer.cells) for layer in self.layers.values())
        if not 0 <= count <= fewest:
            raise ValueError(f"keep={count}: expected 0 to {fewest}, the neurons of a layer.")
        for layer in self.layers.values():
            out = torch.ones(len(layer.neurons), dtype=torch.bool, device=layer.cells.device)
            out[layer.cells] = False
            ranks = layer.usefulness.masked_fill(out, -1.0).argsort(descending=True, stable=True)
            kept = ranks[:count].sort().values
            out[kept] = True
            layer.router.ablated = out if bool(out.any()) else None
            layer.router.always = kept if count else None

    def take_over(self) -> PeerComposedModel:
        """The neurons act instead of their layers."""
        backbone = self.model.remove()
        self._set_out(silent=False)
        self.model = self._composed(backbone, "replace")
        return self.model

    def shrink(
        self,
        loss: Callable[[PeerComposedModel], float],
        budget: float,
        shares: Sequence[float] = SHARES,
        steps: int = 100,
    ) -> list[Shrunk]:
        """Fewer and fewer neurons always act, while the loss rises by at most `budget` over the first share's.

        Of each share of a layer's neurons `loss` tells the loss, after `steps` in which keys learn to find what is left
        to be found. The model stays at the last share within the budget; what was tried is returned, the last too.
        """
        if self.model.settings.mode != "replace":
            raise ValueError("the layers still stand; call take_over() before shrink().")
        tried: list[Shrunk] = []
        fewest = min(len(layer.cells) for layer in self.layers.values())
        for count in dict.fromkeys(round(share * fewest) for share in shares):
            before = {path: _held(layer.router) for path, layer in self.layers.items()}
            self.keep(count)
            if steps and count < fewest:
                self.fit_keys(steps)
            tried.append(Shrunk(count, loss(self.model)))
            if tried[-1].loss > tried[0].loss + budget:
                self.keep(tried[-2].keep)
                for path, layer in self.layers.items():
                    _put_back(layer.router, before[path])
                break
        return tried

    def _set_out(self, *, silent: bool) -> None:
        """The neurons' rows out and the layer's bias out: zero, or what they are."""
        for layer in self.layers.values():
            rows, bias = layer.experts.table.get_parameter("rows"), layer.neurons.out_bias
            with torch.no_grad():
                rows[:, -1] = 0.0 if silent else layer.neurons.rows[:, -1]
            layer.experts.out_bias = None if silent or bias is None else nn.Parameter(bias.clone())

    def _composed(self, backbone: nn.Module, mode: Any) -> PeerComposedModel:
        settings = PeerConfig(**{**asdict(self._settings), "mode": mode})
        mixtures: dict[str, Mixture] = {}
        for path, layer in self.layers.items():
            base = backbone.get_submodule(path) if mode == "parallel" else None
            mixtures[path] = Mixture(base, layer.router, layer.experts, entry=layer.place.entry)
        described = Composition(
            method=METHOD.name,
            config=asdict(settings),
            backbone={**provenance(backbone), "fingerprint": fingerprint(backbone)},
            citation=METHOD.paper.bibtex,
        )
        seen = probe(backbone, list(mixtures))
        ordered = {path: mixtures[path] for path in seen.sites}
        return PeerComposedModel(backbone, ordered, (), described, seen).train(backbone.training)


def convert(
    backbone: nn.Module,
    data: Any = None,
    *,
    sites: str | Sequence[str] = "all",
    top_k: int | None = None,
    keep: int = 0,
    grid: tuple[int, int] | None = None,
    dim_key: int = 64,
    gate: GateName = "one",
    fit_steps: int = 400,
    tokens: int = 16384,
    seed: int = 0,
) -> PeerComposedModel:
    """The backbone with its feed-forward layers as PEER layers, whose experts are their own neurons.

    `sites`: as in `compose`. `top_k`: neurons that are retrieved for a token; None: all of them, which with gate `one`
    is the backbone up to rounding. `keep`: neurons of each layer, the most useful, that always act besides. `data`:
    calibration text, some thousand tokens (`tokens` of them are used): batches of the backbone's inputs, as mappings,
    token ids or `Batches`; without it keys stay at their first values. `grid`: near-square unless given; (1, f) finds
    more at the cost of f scores. `gate`: `sigmoid` lets keys learn with the model afterwards. See `Conversion` for the
    steps one by one. Raises ValueError for a layer that can't be read as neurons.
    """
    steps = Conversion(
        backbone, data, sites=sites, top_k=top_k, grid=grid, dim_key=dim_key, gate=gate, tokens=tokens, seed=seed
    )
    if keep:
        steps.keep(keep)
    if data is not None and top_k is not None and fit_steps:
        steps.fit_keys(fit_steps)
    return steps.take_over()


def _layer(place: Place, read: Neurons, inputs: Tensor | None, options: dict[str, Any], cluster: str) -> _Layer:
    profiles = None if inputs is None or cluster == "rows" else _profiles(read, inputs)
    router, experts, cells = converted(read, alike=profiles, **options)
    neurons = read.arranged(cells, router.num_experts)
    if inputs is None:
        usefulness = neurons.rows[:, -2].norm(dim=-1) * neurons.rows[:, -1].norm(dim=-1)
    else:
        usefulness = neurons.importance(inputs[:_PROFILED]).mean(0)
    return _Layer(place, router, experts, neurons, cells, usefulness.float(), inputs)


_PROFILED = 2048


def _profiles(neurons: Neurons, inputs: Tensor) -> Tensor:
    """On which calibration tokens each neuron matters, relative to its mean: what neurons that act together share."""
    importance = neurons.importance(inputs[:_PROFILED])
    return (importance / importance.mean(0).clamp_min(1e-12) - 1.0).T.contiguous()


def _active(top_k: int | None, read: dict[str, Neurons]) -> int:
    counts = [len(found) for found in read.values()]
    active = _same("widths", counts) if top_k is None else top_k
    if not 1 <= active <= min(counts):
        raise ValueError(f"top_k={top_k}: expected 1 to {min(counts)}, the neurons of a layer; or None for all.")
    return active


def _same(what: str, values: Sequence[Any]) -> Any:
    if len(set(values)) > 1:
        listed = ", ".join(str(value) for value in dict.fromkeys(values))
        raise ValueError(f"sites: their layers have different {what} ({listed}); convert them in models of their own.")
    return values[0]


def _held(router: ProductKeyRouter) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in router.named_parameters()}


@torch.no_grad()
def _put_back(router: ProductKeyRouter, held: dict[str, Tensor]) -> None:
    for name, parameter in router.named_parameters():
        parameter.copy_(held[name])
