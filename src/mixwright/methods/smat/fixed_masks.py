"""Masks that nobody learns: all ones, random ones, and those that somebody gives."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mixwright.experts.sparse_deltas import SparseDeltas
from mixwright.methods.smat.config import SmatConfig
from mixwright.ops.hard_concrete import LIMIT


@torch.no_grad()
def fix_masks(deltas: SparseDeltas, config: SmatConfig) -> None:
    """Put in the masks that `config.masks` asks for, by logits at their limits; `given` ones are all ones till then."""
    draw = torch.Generator().manual_seed(config.seed)
    for logits in deltas.logits.values():
        if config.masks in ("all", "given"):
            logits.fill_(LIMIT)
        elif config.masks == "random":
            kept = torch.rand(logits.shape, generator=draw) >= config.sparsity
            logits.copy_(torch.where(kept, LIMIT, -LIMIT))


@torch.no_grad()
def set_masks(deltas: SparseDeltas, masks: Mapping[str, Tensor], expert: int | None = None) -> None:
    """Let an expert, or all of them, act where `masks` is true, by parameter; on what is not named it does not act.

    A mask has a value for each of what the pool's own masks decide about. Raises ValueError for a name or a shape that
    does not fit, and changes nothing.
    """
    logits = {name: deltas.logits[name.replace(".", "/")] for name in deltas.names}
    for name, mask in masks.items():
        if name not in logits or logits[name].shape[1:] != mask.shape:
            expected = f"{tuple(logits[name].shape[1:])}" if name in logits else f"one of {', '.join(deltas.names[:3])}"
            raise ValueError(f"masks[{name!r}]: {tuple(mask.shape)}; expected {expected}.")
    for name, held in logits.items():
        chosen = held if expert is None else held[expert]
        mask = masks.get(name)
        kept = torch.tensor(False) if mask is None else mask.bool()
        chosen.copy_(torch.where(kept.to(held.device), LIMIT, -LIMIT).expand_as(chosen))
