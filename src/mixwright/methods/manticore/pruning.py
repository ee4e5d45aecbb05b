"""A discretised hybrid without what it does not use: one run of layers per block, and nothing else.

Which component owns a slot is read off the mixture weights. A component keeps the layers of its blocks, renumbered;
the embedding, the last norm and the head only where it owns the slot that reads them; and no projector is left, since a
component that acts alone meets none.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mixwright.backbones.absent import leave_out, unused
from mixwright.backbones.eval_mode import eval_mode
from mixwright.backbones.parts import parts_of
from mixwright.backbones.prune import pruned
from mixwright.config import decode
from mixwright.errors import IncompatibleExpert
from mixwright.methods.manticore.config import ManticoreConfig
from mixwright.methods.manticore.model import EMBEDDING, HEAD, HybridModel, compose

_TOKENS = 6


def owners(model: HybridModel) -> dict[str, int]:
    """The one component that acts at each slot. Raises ValueError where several may."""
    found: dict[str, int] = {}
    for slot in model.mixtures:
        live = [at for at, name in enumerate(model.experts) if slot in model.acts_at(name)]
        if len(live) != 1:
            names = ", ".join(model.experts[at] for at in live)
            raise ValueError(f"{slot} mixes {names}; `discretise()` the hybrid before it is pruned or exported.")
        found[slot] = live[0]
    return found


def pruned_hybrid(model: HybridModel) -> HybridModel:
    """The same function out of the layers that act alone. Nothing of `model` is changed or shared.

    A component that its family does not let cut stays whole, and unused modules that turn out to be read stay too: what
    comes out is compared with `model` to the bit on a few tokens.
    """
    of = owners(model)
    kept = [at for at in range(len(model.experts)) if at in of.values()]
    for slim in (True, False):
        cut = [_cut(model, at, of, slim) for at in kept]
        small = _composed(model, kept, of, cut)
        if _same(model, small, strict=not slim):
            return small
    raise IncompatibleExpert(
        "PRUNE",
        " and ".join(model.experts[at] for at in kept),
        "the layers that act give other logits by themselves than in the hybrid; save the hybrid as it is.",
    )


def _cut(
    model: HybridModel, at: int, of: dict[str, int], slim: bool
) -> tuple[nn.Module, tuple[int, ...], tuple[str, ...]]:
    """A component cut down, its layers by block, and the modules that it lost."""
    component, hybrid = model.components[at], model.backbone
    blocks = [of[f"blocks.{k}"] == at for k in range(hybrid.num_blocks)]
    runs = hybrid.runs[at]
    layers = [layer for run, own in zip(runs, blocks) if own for layer in run]
    counts = tuple(len(run) if own else 0 for run, own in zip(runs, blocks))
    try:
        small = pruned(component, layers or [0])
    except IncompatibleExpert:
        small, counts = copy.deepcopy(component), tuple(map(len, runs))
    parts = parts_of(small, model.experts[at])
    roles = {"embeds": of[EMBEDDING] == at, "ends": blocks[-1] or counts[-1] > 0, "heads": of[HEAD] == at}
    absent = unused(small, parts, **roles) if slim else ()
    return copy.deepcopy(leave_out(small, parts, absent)), counts, absent


def _composed(
    model: HybridModel, kept: Sequence[int], of: dict[str, int], cut: Sequence[tuple[nn.Module, tuple[int, ...], Any]]
) -> HybridModel:
    names = tuple(model.experts[at] for at in kept)
    before = decode(ManticoreConfig, dict(model.composition.config), where="composition")
    stated = {name: spdx for name, spdx in (before.licences or {}).items() if name in names}
    config = replace(
        before,
        projectors="none",
        rows="own",
        weights="static",
        names=names,
        layers=tuple(counts for _, counts, _ in cut),
        mixture_weights=None,
        licences=stated or None,
    )
    small = compose(config, [component for component, _, _ in cut])
    for slot in small.mixtures:
        small.row(slot).set(nn.functional.one_hot(torch.tensor(kept.index(of[slot])), len(kept)).float())
    entries = {str(entry["id"]): entry for entry in model.composition.experts}
    small.composition = replace(
        small.composition,
        experts=[_entry(entries[name], absent) for name, (_, _, absent) in zip(names, cut)],
        ledger={name: entry for name, entry in model.composition.ledger.items() if name in names},
    )
    small.tokenizer = model.tokenizer
    return small


def _entry(entry: Any, absent: Sequence[str]) -> dict[str, Any]:
    before = entry["backbone"].get("absent", ())
    return {**entry, "backbone": {**entry["backbone"], "absent": [*before, *absent]}}


def _same(model: HybridModel, small: HybridModel, *, strict: bool) -> bool:
    """Whether both give the same logits, to the bit, on a few tokens; one that fails does not, unless `strict`."""
    device = model.backbone.device
    top = model.backbone.vocab_size
    ids = (torch.arange(1, _TOKENS + 1, device=device) * 7919 % top)[None]
    with torch.no_grad(), eval_mode(model), eval_mode(small):
        wanted = model(input_ids=ids).logits
        try:
            return torch.equal(small(input_ids=ids).logits[..., :top], wanted)
        except Exception:  # a foreign forward that reads what is not there
            if strict:
                raise
            return False
