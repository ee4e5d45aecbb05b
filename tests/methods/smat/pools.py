"""Small pools for tests: composed on a tiny backbone, and moved as training would."""

from typing import Any

import torch
from torch import nn

import mixwright as mw
from mixwright.backbones.tiny import tiny_backbone
from mixwright.methods.smat.model import FewShotModel
from mixwright.ops.hard_concrete import LIMIT


def fresh_pool(backbone: nn.Module | str = "vit", **config: Any) -> FewShotModel:
    """Three experts, unless told otherwise, around a model or a tiny one of a family."""
    base = tiny_backbone(backbone) if isinstance(backbone, str) else backbone
    model = mw.compose("smat", backbone=base, **{"experts": 3, **config})
    assert isinstance(model, FewShotModel)
    return model


def moved(model: FewShotModel, spread: float = 4.0, middle: float = 0.0) -> FewShotModel:
    """The same pool with a change that is not zero, and mask logits around `middle`; in evaluation."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for delta in model.deltas.delta.values():
            delta.copy_(torch.randn(delta.shape, generator=draw) * 0.1)
        for logits in model.deltas.logits.values():
            logits.copy_((torch.randn(logits.shape, generator=draw) * spread + middle).clamp(-LIMIT, LIMIT))
    return model.eval()
