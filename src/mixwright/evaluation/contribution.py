"""How much each expert adds to what a frozen layer gives: norm(w s B A u) / norm(W u), measured during one pass."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel
from mixwright.routing import Condition, Routing


class Tally:
    """Sums of applied weights and contributions for one text, by token and by depth.

    `streams`: name -> number of tokens. A token's means run over the sites that it passes, a depth's over its tokens
    and sites. A depth is a block of the backbone, named by its path up to the block's number.
    """

    def __init__(self, streams: Mapping[str, int], num_experts: int) -> None:
        self.streams = dict(streams)
        self._weights = {name: torch.zeros(size, num_experts) for name, size in streams.items()}
        self._contributions = {name: torch.zeros(size, num_experts) for name, size in streams.items()}
        self._margins = {name: torch.zeros(size) for name, size in streams.items()}
        self._sites = dict.fromkeys(streams, 0)
        self._by_depth: dict[str, tuple[Tensor, Tensor, int]] = {}
        self._num_experts = num_experts

    def add(
        self,
        site: str,
        stream: str | None,
        weights: Float[Tensor, "tokens experts"],
        contribution: Float[Tensor, "tokens experts"],
    ) -> None:
        """Count one site. `stream` is None for a site whose inputs are not one token each, such as a pooler."""
        if stream is not None:
            self._weights[stream] += weights
            self._contributions[stream] += contribution
            self._margins[stream] += _margin(weights)
            self._sites[stream] += 1
        empty = (torch.zeros(self._num_experts), torch.zeros(self._num_experts), 0)
        summed, added, count = self._by_depth.get(depth_of(site), empty)
        self._by_depth[depth_of(site)] = (summed + weights.sum(0), added + contribution.sum(0), count + len(weights))

    @property
    def depths(self) -> list[str]:
        """The depths, in the order of the pass."""
        return list(self._by_depth)

    def weights(self, stream: str) -> list[list[float]]:
        """Mean applied weight of each token and expert."""
        return (self._weights[stream] / max(self._sites[stream], 1)).tolist()

    def contributions(self, stream: str) -> list[list[float]]:
        """Mean contribution of each token and expert."""
        return (self._contributions[stream] / max(self._sites[stream], 1)).tolist()

    def margins(self, stream: str) -> list[float]:
        """Largest minus second largest applied weight, mean over a token's sites."""
        return (self._margins[stream] / max(self._sites[stream], 1)).tolist()

    def weight_by_depth(self) -> list[list[float]]:
        """Mean applied weight at each depth, for each expert."""
        return [(weights / max(count, 1)).tolist() for weights, _, count in self._by_depth.values()]

    def contribution_by_depth(self) -> list[list[float]]:
        """Mean contribution at each depth, for each expert."""
        return [(added / max(count, 1)).tolist() for _, added, count in self._by_depth.values()]

    def leaders(self, stream: str) -> list[int | None]:
        """For each token the expert that contributes most, or the one that holds over half of the weight and adds
        nothing by design (the null expert), or None where nobody acts."""
        leaders: list[int | None] = []
        silent = ~torch.stack([added > 0 for _, added, _ in self._by_depth.values()]).any(0)
        for weights, added in zip(self._weights[stream], self._contributions[stream], strict=True):
            idle = (weights * silent) > weights.sum() / 2
            if idle.any():
                leaders.append(int(idle.nonzero()[0]))
            else:
                leaders.append(int(added.argmax()) if added.max() > 0 else None)
        return leaders


def depth_of(site: str) -> str:
    """`model.layers.3.self_attn.q_proj` -> `model.layers.3`; a site outside numbered blocks is a depth of its own."""
    found = re.match(r"(.*?\.\d+)\.", site + ".")
    return found.group(1) if found else site


def measured(model: ComposedModel, streams: Mapping[str, int], inputs: Mapping[str, Any]) -> tuple[Tally, Any]:
    """One pass over one text: the tally of its experts, and the model's output.

    `streams`: the number of tokens of `text`, or of `source` and, where a target is given, `target`.
    """
    tally = Tally(streams, len(model.experts))
    with model.trace() as trace:

        def note(mixture: nn.Module, args: tuple[Any, ...], _: Any) -> None:
            assert isinstance(mixture, Mixture)
            x = args[0].reshape(-1, args[0].shape[-1])
            routing = trace[mixture.site][-1]
            weights = _flat_weights(routing, args[0])
            stream = _stream(mixture.stream, two="source" in streams)
            known = stream if streams.get(stream) == len(x) else None
            tally.add(mixture.site, known, weights.cpu(), contribution(mixture, x, weights).cpu())

        handles = [mixture.register_forward_hook(note) for mixture in model.mixtures.values()]
        try:
            output = model(**inputs)
        finally:
            for handle in handles:
                handle.remove()
    return tally, output


def _stream(seen: str, *, two: bool) -> str:
    """Whose tokens a site works on: a decoder's layer that is fed with encoder states works on the source's."""
    names = {"decoder": "target", "encoder": "source", "cross": "source"} if two else {"decoder": "text"}
    return names.get(seen, "")


def contribution(
    mixture: Mixture, x: Float[Tensor, "tokens d_in"], weights: Float[Tensor, "tokens experts"]
) -> Float[Tensor, "tokens experts"]:
    """norm(w_e f_e(u)) / norm(W u) of every token and expert; the layer's bias is left out of W u.

    One pair of products for each expert that acts, over the tokens on which it does.
    """
    ratio = torch.zeros_like(weights)
    base = _without_bias(mixture.base, x)
    for expert in (weights > 0).any(0).nonzero().squeeze(-1).tolist():
        rows = (weights[:, expert] > 0).nonzero().squeeze(-1)
        one = Routing(weights[rows, expert, None], mixture.experts.num_experts, torch.full_like(rows, expert)[:, None])
        ratio[rows, expert] = mixture.experts(x[rows], one, Condition()).float().norm(dim=-1)
    return ratio if base is None else ratio / base.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def _without_bias(base: nn.Module | None, x: Tensor) -> Tensor | None:
    if base is None:
        return None
    bias = getattr(base, "bias", None)
    out = base(x).float()
    return out - bias.float() if isinstance(bias, Tensor) else out


def _flat_weights(routing: Routing, x: Tensor) -> Float[Tensor, "tokens experts"]:
    dense = routing.dense().detach().float()
    tokens = x.shape[:-1]
    if dense[..., 0].numel() != tokens.numel():
        dense = dense.expand(*tokens, routing.num_experts)
    return dense.reshape(-1, routing.num_experts)


def _margin(weights: Float[Tensor, "tokens experts"]) -> Float[Tensor, " tokens"]:
    if weights.shape[-1] == 1:
        return weights[:, 0]
    best = weights.topk(2, dim=-1).values
    return best[:, 0] - best[:, 1]
