"""One plain loop for every system of the pretrained comparison, that none is favoured by its loop; and what it costs.

AdamW without decay, a tenth of warm-up, then down to zero along a cosine, gradients clipped at norm 1. Mixture weights
have an optimiser of their own, outside clipping. Every system sees the same windows in the same order for a seed.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.hybrid_pretrained_pair import loss_of
from benchmarks.hybrid_pretrained_texts import BATCH, LENGTH

Windows = Callable[[int], Tensor]


@dataclass(slots=True)
class Spent:
    """What a system has cost so far: optimiser steps on its target, their FLOPs, and processor seconds."""

    steps: int = 0
    flops: float = 0.0
    seconds: float = 0.0


def train(
    model: nn.Module,
    trained: Iterable[nn.Parameter],
    windows: Windows,
    steps: int,
    rate: float,
    spent: Spent,
    *,
    first: int = 0,
    each: Callable[[int], None] | None = None,
    also: Sequence[nn.Parameter] = (),
) -> list[float]:
    """Train these parameters of the model, in place; the losses of every step.

    `first`: the number of the first step's windows. `each` is called between the gradient and the update; parameters
    of `also` have gradients then, and are its business.
    """
    chosen = list(trained)
    with only_these(model, chosen, also):
        optimizer = torch.optim.AdamW(chosen, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        spent.flops += steps * step_flops(model, chosen)
        started, losses = time.process_time(), list[float]()
        model.train()
        for step in range(steps):
            share = min((step + 1) / (0.1 * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = rate * share
            loss = loss_of(model, windows(first + step))
            model.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(chosen, 1.0)
            if each is not None:
                each(step)
            optimizer.step()
            losses.append(loss.item())
        model.eval()
        spent.steps += steps
        spent.seconds += time.process_time() - started
    return losses


@contextmanager
def only_these(model: nn.Module, chosen: Sequence[nn.Parameter], also: Sequence[nn.Parameter] = ()) -> Any:
    """Inside the block no other parameter of the model has a gradient."""
    wanted = {id(p) for p in (*chosen, *also)}
    flags = {p: p.requires_grad for p in model.parameters()}
    try:
        for p in flags:
            p.requires_grad_(id(p) in wanted)
        yield
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)
            p.grad = None


@torch.no_grad()
def document_losses(model: nn.Module, documents: Sequence[Tensor]) -> Float[Tensor, " documents"]:
    """Mean nats per token of each document's windows."""
    model.eval()
    every = torch.cat(list(documents))
    losses: list[Tensor] = []
    for piece in every.split(4 * BATCH):
        logits = model(input_ids=piece[:, :-1], use_cache=False).logits
        found = nn.functional.cross_entropy(logits.flatten(0, 1).float(), piece[:, 1:].flatten(), reduction="none")
        losses.append(found.view(len(piece), LENGTH).mean(1))
    by_document = torch.cat(losses).split([len(windows) for windows in documents])
    return torch.stack([windows.mean() for windows in by_document])


@torch.no_grad()
def forward_flops(model: nn.Module) -> float:
    """Of one token in a pass over a window: those of matrix products, attention and convolutions, as torch counts."""
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, LENGTH, dtype=torch.long), use_cache=False)
    return counter.get_total_flops() / LENGTH


def step_flops(model: nn.Module, trained: Sequence[nn.Parameter]) -> float:
    """Of one optimiser step: forward, as much again for the gradients of activations, and for those of parameters as
    much as their share of all of them. (torch's counter makes too much of a grouped convolution's backward pass.)"""
    share = sum(p.numel() for p in trained) / size_of(model)
    return (2 + share) * forward_flops(model) * BATCH * LENGTH


def size_of(model: nn.Module) -> int:
    """Parameters."""
    return sum(p.numel() for p in model.parameters())
