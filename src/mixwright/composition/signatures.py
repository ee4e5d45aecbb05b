"""Signatures of a text: statistics of the activations that it causes at every site, streamed over batches.

What a signature is for, and what leaves its owner, is said in `mixwright.routers.signature`. The means alone are the
prototypes of average-activation routing, when they are collected with the expert at work.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixwright.backbones.eval_mode import eval_mode
from mixwright.composition.channel import Channel
from mixwright.composition.model import ComposedModel
from mixwright.composition.passes import begin_pass, named_arguments
from mixwright.composition.probe import Probe, probe
from mixwright.errors import IncompatibleExpert
from mixwright.routing import Condition
from mixwright.sites import linear_sites

RANK = 16
_SPARE = 4
_LEAST = 64


class Moments:
    """Mean, variance and the strongest directions of the covariance of rows that come bit by bit.

    Mean and variance by Chan, Golub and LeVeque 1983 in float64, exact up to rounding. The directions by a sketch
    C Omega of the covariance C with max(64, 4 * rank) fixed random columns Omega, of which Nystroem's approximation is
    taken at the end (Tropp et al. 2017, algorithm 3): two thin products for each block of rows, exact for up to 64
    features and for data of no higher rank than Omega's. `rank` 0 keeps no directions.
    """

    def __init__(self, d_in: int, rank: int, device: torch.device) -> None:
        place = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        self.rank = min(rank, d_in)
        self.count = 0
        self.mean = torch.zeros(d_in, dtype=torch.float64, device=place)
        self.squares = torch.zeros_like(self.mean)
        self.anchor = torch.zeros_like(self.mean)
        columns = min(d_in, max(_LEAST, _SPARE * self.rank)) if self.rank else 0
        draw = torch.randn(d_in, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.columns = torch.linalg.qr(draw).Q.to(place)
        self.sketch = torch.zeros_like(self.columns)

    def add(self, rows: Float[Tensor, "tokens d_in"]) -> None:
        """Count these rows in."""
        rows, new = rows.to(self.mean.device, torch.float64), len(rows)
        mean = rows.mean(0)
        if not self.count:
            self.anchor = mean
        if self.rank:
            near = (rows - self.anchor).float()  # small numbers: float32 will do for the directions
            self.sketch += (near.T @ (near @ self.columns.float())).double()
        shift = mean - self.mean
        self.squares += ((rows - mean) ** 2).sum(0) + (self.count * new / (self.count + new)) * shift**2
        self.mean += shift * (new / (self.count + new))
        self.count += new

    def signature(self) -> dict[str, Tensor]:
        """`mean`, `variance`, `count`, and `factor` (rank, d_in) where directions were kept; float32, on the CPU."""
        found = {"mean": self.mean, "variance": self.squares / max(1, self.count)}
        if self.rank:
            found["factor"] = self._factor()
        found["count"] = torch.tensor(float(self.count))
        return {name: value.float().cpu() for name, value in found.items()}

    def _factor(self) -> Float[Tensor, "rank d_in"]:
        moved = self.mean - self.anchor
        sketch = self.sketch / max(1, self.count) - torch.outer(moved, moved @ self.columns)
        nudge = 1e-7 * torch.linalg.matrix_norm(sketch) + torch.finfo(torch.float32).tiny
        sketch = sketch + nudge * self.columns
        core = self.columns.T @ sketch
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        half = sketch @ (vectors * values.clamp_min(nudge).rsqrt())
        left, singular, _ = torch.linalg.svd(half, full_matrices=False)
        strength = (singular**2 - nudge).clamp_min(0.0).sqrt()
        return (left * strength).T[: self.rank]


def collect_signatures(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    sites: Sequence[str] | None = None,
    *,
    rank: int = RANK,
) -> dict[str, dict[str, Tensor]]:
    """Site -> signature of the text in `batches`, each the keyword arguments of a forward pass.

    Counted are the real tokens: those of the attention masks, and, for an encoder-decoder that is given `labels` but
    no mask for them, the ones that are not -100. `model` is a backbone, or a composed model in whatever state the
    caller put it: `with model.disabled()` gives the backbone's activations (a signature), `with model.only(expert)` the
    ones that average-activation routing asks for. For a decoder's own answers, generate them first and pass them here
    in full. `sites` default to a composed model's, or to every linear layer that runs. `rank` directions of the
    covariance are kept, 0 for none; sites that read the same tensor share one computation. Raises ValueError where
    nothing was counted.
    """
    composed = isinstance(model, ComposedModel)
    backbone = model.backbone if composed else model
    seen = model.probe if composed else _look(backbone, sites)
    paths = list(seen.sites if sites is None else sites)
    channel = model.channel if composed else Channel()
    two_streams = bool(getattr(getattr(backbone, "config", None), "is_encoder_decoder", False))
    moments: dict[int, Moments] = {}

    def open_pass(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = named_arguments(module.forward, args, kwargs)
        begin_pass(channel, Condition(), arguments, two_streams=two_streams)

    with ExitStack() as hooks:
        if not composed:
            hooks.callback(backbone.register_forward_pre_hook(open_pass, with_kwargs=True).remove)
        for path in _one_of_each_group(paths, seen):
            listener = _listener(channel, seen.sites[path].stream, seen.sites[path].group, moments, rank)
            hooks.callback(backbone.get_submodule(path).register_forward_pre_hook(listener).remove)
        hooks.enter_context(eval_mode(backbone))
        for batch in batches:
            model(**(_with_target_mask(batch) if two_streams else batch))
    missing = [path for path in paths if seen.sites[path].group not in moments]
    if missing:
        raise ValueError(f"no real token reached {missing[0]}: the batches are empty, or their masks are all zero.")
    return {path: moments[seen.sites[path].group].signature() for path in paths}


def _look(backbone: nn.Module, sites: Sequence[str] | None) -> Probe:
    if sites is not None:
        return probe(backbone, sites)
    paths = list(linear_sites(backbone))
    while True:
        try:
            return probe(backbone, paths)
        except IncompatibleExpert as error:  # a layer that no pass reaches, or a tied head
            paths.remove(error.where)


def _one_of_each_group(paths: Sequence[str], seen: Probe) -> list[str]:
    first: dict[int, str] = {}
    for path in paths:
        first.setdefault(seen.sites[path].group, path)
    return list(first.values())


def _listener(
    channel: Channel, stream: str, group: int, moments: dict[int, Moments], rank: int
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def listen(module: nn.Module, args: tuple[Any, ...]) -> None:
        del module
        x: Tensor = args[0]
        real = channel.condition.token_mask if stream == "decoder" else channel.condition.encoder_mask
        rows = x.reshape(-1, x.shape[-1])
        if real is not None and real.numel() == len(rows):
            rows = rows[real.reshape(-1).to(rows.device)]
        if len(rows):
            moments.setdefault(group, Moments(x.shape[-1], rank, x.device)).add(rows)

    return listen


def _with_target_mask(batch: Mapping[str, Any]) -> dict[str, Any]:
    given = dict(batch)
    if isinstance(given.get("labels"), Tensor) and given.get("decoder_attention_mask") is None:
        given["decoder_attention_mask"] = (given["labels"] != -100).long()
    return given
