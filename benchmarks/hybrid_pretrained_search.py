"""Searches for mixture weights over one supernet, in a plain loop: what differs between them is a few lines each.

Losses are of the training part; `bilevel` takes the mixture weights' gradient on the search part. All start from
uniform weights, which are held for the first tenth of the steps. Draws and the exponentiated gradient are the
toolkit's own.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from benchmarks.hybrid_pretrained_pair import loss_of
from benchmarks.hybrid_pretrained_training import Spent, Windows, train
from mixwright.routers.mixture_weights import Draw, MixtureWeights
from mixwright.training.exponentiated_gradient import ExponentiatedGradient, plain_rows

Search = Literal["darts", "alternating", "bilevel", "gaea", "gumbel", "drnas"]
SEARCHES: tuple[Search, ...] = ("darts", "alternating", "bilevel", "gaea", "gumbel", "drnas")
RATE, ETA, WARMUP = 0.05, 0.1, 0.1
_DRAWS: Mapping[str, Draw] = {"gumbel": "gumbel", "drnas": "dirichlet"}


def rows_of(model: Any) -> list[nn.Parameter]:
    """The mixture logits of a hybrid, the static part where they depend on the input; each once."""
    return [module.logits for module in model.modules() if isinstance(module, MixtureWeights)]


def search(
    model: Any,
    trained: Sequence[nn.Parameter],
    kind: Search,
    windows: Windows,
    held_out: Windows,
    steps: int,
    rate: float,
    spent: Spent,
) -> list[list[list[float]]]:
    """Train `trained` and the mixture weights together; the block rows after each step."""
    rows = rows_of(model)
    routers = [module for module in model.modules() if isinstance(module, MixtureWeights)]
    for router in routers:
        router.draw = _DRAWS.get(kind, "none")
    eg = ExponentiatedGradient([{"params": rows, "lr": ETA}], plain_rows(model)) if kind == "gaea" else None
    learns = eg or torch.optim.Adam(rows, lr=RATE)
    path: list[list[list[float]]] = []

    def update(step: int) -> None:
        if step < WARMUP * steps:
            path.append(model.mixture_weights.tolist())
            return
        if kind == "bilevel":
            for row, grad in zip(rows, torch.autograd.grad(loss_of(model, held_out(step)), rows), strict=True):
                row.grad = grad
        if kind != "alternating" or step % 2:
            learns.step()
        for row in rows:
            row.grad = None
        if kind == "alternating" and step % 2:
            for p in trained:
                p.grad = None
        path.append(model.mixture_weights.tolist())

    train(model, trained, windows, steps, rate, spent, each=update, also=rows)
    for router in routers:
        router.draw = "none"
    return path
