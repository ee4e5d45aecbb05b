"""Searches for mixture weights over one supernet, in a plain loop: what differs between them is a few lines each.

Losses are of the training part; `bilevel` takes the mixture weights' gradient on the search part. All start from
uniform weights, which are held for the first tenth of the steps.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.hybrid_pretrained_pair import loss_of
from benchmarks.hybrid_pretrained_training import Spent, Windows, train

Search = Literal["darts", "alternating", "bilevel", "gaea", "gumbel", "drnas"]
SEARCHES: tuple[Search, ...] = ("darts", "alternating", "bilevel", "gaea", "gumbel", "drnas")
RATE, ETA, FLOOR, WARMUP = 0.05, 0.1, 1e-5, 0.1


def rows_of(model: Any) -> list[nn.Parameter]:
    """The mixture logits of a hybrid, each once."""
    return list({id(p): p for n, p in model.named_parameters() if n.endswith("router.logits")}.values())


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
    routers = [m for m in model.modules() if hasattr(m, "logits") and hasattr(m, "allowed")]
    for router in routers:
        router.draw = {"gumbel": "gumbel", "drnas": "dirichlet"}.get(kind, "none")
    adam = torch.optim.Adam(rows, lr=RATE)
    path: list[list[list[float]]] = []

    def update(step: int) -> None:
        if step < WARMUP * steps:
            path.append(model.mixture_weights.tolist())
            return
        if kind == "alternating" and step % 2 == 0:
            pass
        elif kind == "gaea":
            _exponentiated(rows)
        else:
            if kind == "bilevel":
                grads = torch.autograd.grad(loss_of(model, held_out(step)), rows)
                for row, grad in zip(rows, grads, strict=True):
                    row.grad = grad
            adam.step()
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


@torch.no_grad()
def _exponentiated(rows: Sequence[nn.Parameter]) -> None:
    """alpha <- alpha exp(-eta g) / Z, with g the gradient by alpha: that by the logits over alpha, up to a constant."""
    for row in rows:
        alpha: Tensor = row.softmax(-1)
        assert row.grad is not None
        moved = (row - ETA * row.grad / alpha).softmax(-1).clamp_min(FLOOR)
        row.copy_((moved / moved.sum()).log())
