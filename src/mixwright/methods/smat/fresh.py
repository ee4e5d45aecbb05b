"""The experts that a pool begins with, learned ones and those of the baselines; masks that somebody gives."""

import os
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mixwright.experts.block_of import block_of
from mixwright.experts.dense_deltas import DenseDeltas
from mixwright.experts.sparse_deltas import SparseDeltas
from mixwright.methods.smat.config import SmatConfig
from mixwright.ops.hard_concrete import LIMIT

Experts = SparseDeltas | DenseDeltas


def refuse_huge(shapes: Mapping[str, torch.Size], config: SmatConfig) -> None:
    """Raises ValueError for more experts than the machine has memory for; a small file can claim any number."""
    weights = sum(shape.numel() for shape in shapes.values())
    each = config.experts if config.mask_unit == "weight" or config.changes == "own" else 0
    needed = 4 * weights * (each + 1)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ValueError(
            f"{config.experts} experts over {weights} weights take {needed / 2**30:.0f} GiB, and this machine has "
            f"{memory / 2**30:.0f}."
        )


@torch.no_grad()
def fresh_experts(config: SmatConfig, shapes: Mapping[str, torch.Size]) -> Experts:
    """Experts whose change is zero. Fixed masks are logits at their limits; given ones are all ones until then.

    Raises ValueError where each block shall have a mixture and there is only one.
    """
    if config.changes == "own":
        return DenseDeltas(shapes, config.experts)
    deltas = SparseDeltas(
        shapes,
        config.experts,
        config.mask_unit,
        config.seed,
        noise=config.mask_noise,
        regrowth=config.regrowth,
        block_of=_blocks(shapes) if config.mixture == "block" else None,
    )
    draw = torch.Generator().manual_seed(config.seed)
    for logits in deltas.logits.values():
        if config.masks in ("all", "given"):
            logits.fill_(LIMIT)
        elif config.masks == "random":
            kept = torch.rand(logits.shape, generator=draw) >= config.sparsity
            logits.copy_(torch.where(kept, LIMIT, -LIMIT))
    return deltas


def _blocks(names: Iterable[str]) -> dict[str, str]:
    found = block_of(names)
    if len(set(found.values())) < 2:
        raise ValueError(
            f"mixture 'block': the {len(found)} parameters that may change lie in one block of the backbone, "
            f"{next(iter(found.values()))!r} (see experts.block_of); take mixture 'whole'."
        )
    return found


@torch.no_grad()
def set_masks(deltas: SparseDeltas, masks: Mapping[str, Tensor], expert: int | None = None) -> None:
    """Let an expert, or all of them, act where `masks` is true, by parameter; on what is not named it does not act.

    A mask has a value for each of what the pool's own masks decide about. Raises ValueError for a name or a shape that
    does not fit, and changes nothing.
    """
    held = {name: deltas.logits_of(name) for name in deltas.names}
    for name, mask in masks.items():
        if name not in held or held[name].shape[1:] != mask.shape:
            expected = f"{tuple(held[name].shape[1:])}" if name in held else f"one of {', '.join(deltas.names[:3])}"
            raise ValueError(f"masks[{name!r}]: {tuple(mask.shape)}; expected {expected}.")
    for name, logits in held.items():
        kept = masks.get(name, torch.tensor(False)).bool().to(logits.device)
        chosen = logits if expert is None else logits[expert]
        chosen.copy_(torch.where(kept, LIMIT, -LIMIT).expand_as(chosen))
