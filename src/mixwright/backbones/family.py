"""Families of causal language models, each at hand as a tiny random model that shows what the family can do."""

from difflib import get_close_matches
from pathlib import Path

import torch
from torch import nn

from mixwright.backbones.hf import build_backbone, causal_families, default_settings, read_settings
from mixwright.backbones.shrink import shrunk

_MOST = 8_000_000


def family_of(name: str | Path) -> str:
    """The family that a name or a model's folder belongs to; ValueError with the nearest one if there is none."""
    families = causal_families()
    if str(name) in families:
        return str(name)
    if Path(name).expanduser().is_dir() or str(name).count("/") == 1:
        family = str(read_settings(name)["model_type"])
        if family not in families:
            raise ValueError(f"{name} is of the family {family!r}, which has no causal language model.")
        return family
    spelled = str(name).lower().replace("-", "_")
    near = get_close_matches(spelled, families, n=3, cutoff=0.5)
    advice = (
        f"did you mean {' or '.join(near)}?" if near else f"there are {len(families)}, such as gpt_neox and mamba2."
    )
    raise ValueError(f"{str(name)!r} is no family of causal language models and no folder; {advice}")


def tiny_of(name: str | Path, *, seed: int = 0) -> nn.Module:
    """A tiny model with random weights: a family's defaults, or the config of a folder, with all sizes cut down.

    Raises ValueError where that can't be done, with the reason.
    """
    family = family_of(name)
    settings = shrunk(default_settings(family) if family == str(name) else read_settings(name), family)
    settings.pop("model_type", None)
    try:
        with torch.device("meta"):
            size = sum(value.numel() for value in build_backbone(family, settings, kind="causal").parameters())
        if size > _MOST:
            raise ValueError(f"{size:,} parameters are left, and {_MOST:,} are the most for a probe")
        return build_backbone(family, settings, kind="causal", seed=seed)
    except Exception as error:  # each family's config and constructor refuse in their own ways
        raise ValueError(f"no tiny model of {family} can be made: {short(error)}") from error


def short(error: BaseException) -> str:
    """What an error of a foreign model says, on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
