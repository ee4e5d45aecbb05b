"""A PEER layer learns from the feed-forward layer that it stands for, site by site, while that layer still acts."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel
from mixwright.data.collate import Batch
from mixwright.routers.retriever import counted_tokens
from mixwright.training.objectives import supervised


def match_replaced(model: Any, batch: Batch) -> Tensor:
    """sum over sites of |PEER(x) - FFN(x)|^2 / |FFN(x)|^2 over real tokens, times the targets of the batch.

    The pass is the backbone's own, so that every site reads what the layer that it replaced reads. 1 is what a layer
    that says nothing misses; the loop divides by the number of targets. Raises ValueError where nothing was replaced.
    """
    assert isinstance(model, ComposedModel)
    kept = [site for site, mixture in model.mixtures.items() if mixture.replaced is None]
    if kept:
        raise ValueError(f"{kept[0]} keeps its layer (mode='parallel'), so that there is nothing to distil there.")
    errors: list[Tensor] = []
    with ExitStack() as hooks, torch.no_grad(), model.disabled():
        for mixture in model.mixtures.values():
            _listen(model.backbone, mixture, hooks, errors)
        supervised(model, batch)
    return torch.stack(errors).sum() * batch.weight


def _listen(backbone: nn.Module, mixture: Mixture, hooks: ExitStack, errors: list[Tensor]) -> None:
    """Compare at one site, whenever the backbone calls it."""
    read: list[Tensor] = []
    reader = backbone.get_submodule(mixture.entry) if mixture.entry else mixture

    def remember(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        del module
        read.append(args[0])

    def compare(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        del module, args
        with torch.enable_grad():
            errors.append(_missed(mixture, read.pop(), output))

    callbacks: tuple[Callable[[], None], ...] = (
        reader.register_forward_pre_hook(remember).remove,
        mixture.register_forward_hook(compare).remove,
    )
    for callback in callbacks:
        hooks.callback(callback)


def _missed(mixture: Mixture, x: Tensor, wanted: Tensor) -> Tensor:
    said = mixture.experts_on(x)
    counted = counted_tokens(said.shape[:-1], mixture.channel.condition_at(mixture.stream))
    error, size = ((t.reshape(-1, t.shape[-1]).float()).square().sum(-1) for t in (said - wanted.view_as(said), wanted))
    if counted is not None:
        error, size = (t * counted.reshape(-1) for t in (error, size))
    return error.sum() / size.sum().clamp_min(torch.finfo(size.dtype).tiny)
