"""Which parameters of a hybrid learn in a stage: projectors, the parts of components that act, mixture weights."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from mixwright.methods.manticore.model import EMBEDDING, HEAD, HybridModel

ENTER, LEAVE = "*.experts.enter.*", "*.experts.leave.*"
PROJECTORS = (ENTER, LEAVE)
WEIGHTS = ("*.router.logits", "*.router.static.logits", "*.router.slope")
_COMPONENT = "backbone.components"


def present(model: nn.Module, globs: Iterable[str]) -> tuple[str, ...]:
    """Those of the globs that select anything: a hybrid without projectors has none."""
    names = [name for name, _ in model.named_parameters()]
    return tuple(glob for glob in globs if any(fnmatchcase(name, glob) for name in names))


def live_projectors(model: HybridModel) -> tuple[str, ...]:
    """Globs over the projectors that act: both of a component in each block in which its weight is neither 0 nor 1."""
    rows = model.mixture_weights
    mixed = [
        f"backbone.blocks.{k}.experts.{side}.{m}.*"
        for k, m in ((rows > 0) & (rows < 1)).nonzero().tolist()
        for side in ("enter", "leave")
    ]
    return present(model, mixed)


def live_components(model: HybridModel) -> tuple[str, ...]:
    """Globs over the parts of components that act: layers of blocks in which they have any weight, embeddings and heads
    likewise, and of each that acts at all, whatever belongs to neither."""
    acts = torch.stack([model.embedding_weights, *model.mixture_weights, model.head_weights]).cpu() > 0
    found: list[str] = []
    for m in acts.any(0).nonzero().flatten().tolist():
        found += _parts(model, m, acts[:, m].tolist())
    return present(model, found)


def _parts(model: HybridModel, m: int, acts: Sequence[bool]) -> list[str]:
    component, parts, runs = model.components[m], model.backbone.parts[m], model.backbone.runs[m]
    layers = [i for acting, run in zip(acts[1:-1], runs) if acting for i in run]
    idle = _idle_ends(component, embeds=acts[0], heads=acts[-1])
    others = [
        name
        for name, p in component.named_parameters()
        if not name.startswith(f"{parts.layers}.") and id(p) not in idle
    ]
    root = f"{_COMPONENT}.{m}"
    return [*(f"{root}.{parts.layers}.{i}.*" for i in layers), *(f"{root}.{name}" for name in others)]


def _idle_ends(component: nn.Module, *, embeds: bool, heads: bool) -> set[int]:
    """Parameters of an embedding or a head that nobody reads; tied ones are read if either is."""
    ends: tuple[tuple[bool, nn.Module], ...] = (
        (embeds, component.get_input_embeddings()),  # type: ignore[operator]
        (heads, component.get_output_embeddings()),  # type: ignore[operator]
    )
    used = {id(p) for acting, module in ends if acting for p in module.parameters()}
    return {id(p) for acting, module in ends if not acting for p in module.parameters()} - used


def slots(model: HybridModel) -> tuple[str, ...]:
    """The slots of the rows, in the order of the pass."""
    return (EMBEDDING, *(f"blocks.{k}" for k in range(model.backbone.num_blocks)), HEAD)
