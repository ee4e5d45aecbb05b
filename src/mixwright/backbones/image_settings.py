"""How a backbone wants its images: what lies beside it, and what its config says."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn

from mixwright.backbones.hf import fetch
from mixwright.errors import CatalogError

_FILE = "preprocessor_config.json"
_LARGEST = 1 << 20


def load_image_settings(path_or_id: str | Path, *, revision: str | None = None) -> Mapping[str, Any] | None:
    """The `preprocessor_config.json` beside a backbone; None where there is none.

    Raises CatalogError (PATH, CONFIG) for a backbone that is not there, and a file that is no JSON object.
    """
    path = fetch(path_or_id, revision, (_FILE,)) / _FILE
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"{path.stat().st_size} bytes")
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise CatalogError("CONFIG", str(path_or_id), f"{_FILE} cannot be read ({error}).") from error
    if not isinstance(settings, dict):
        raise CatalogError("CONFIG", str(path_or_id), f"{_FILE} is no JSON object.")
    return cast(dict[str, Any], settings)


def own_settings(backbone: nn.Module) -> Mapping[str, Any] | None:
    """What a timm model says of its images, in the words of a `preprocessor_config.json`; None for any other model."""
    said: Any = getattr(backbone, "pretrained_cfg", None)
    if not isinstance(said, Mapping) or not hasattr(backbone, "forward_features"):
        return None
    shape: Any = said.get("input_size")
    sides: Any = getattr(getattr(backbone, "patch_embed", None), "img_size", None) or (shape[1:] if shape else None)
    if sides is None or len(set(sides)) != 1:
        return None
    named = {"image_mean": "mean", "image_std": "std", "crop_pct": "crop_pct"}
    return {"size": int(sides[0]), **{key: said[name] for key, name in named.items() if said.get(name) is not None}}


def image_side(backbone: nn.Module) -> int | None:
    """The side of the images that a backbone was made for, where its config says it."""
    own = own_settings(backbone)
    if own is not None:
        return own["size"]
    side = getattr(getattr(backbone, "config", None), "image_size", None)
    if isinstance(side, list | tuple):
        side = side[0] if len(set(side)) == 1 else None
    return side if isinstance(side, int) else None


def image_channels(backbone: nn.Module) -> int:
    """The channels of its images: 3 unless its config says otherwise."""
    own = own_settings(backbone)
    if own is not None:
        mean: Any = own.get("image_mean", (0.5,) * 3)
        return len(mean)
    channels = getattr(getattr(backbone, "config", None), "num_channels", 3)
    return channels if isinstance(channels, int) else 3


def reads_images(backbone: nn.Module) -> bool | None:
    """Whether it reads images rather than text; None for a model that does not say."""
    if own_settings(backbone) is not None:
        return True
    name = getattr(backbone, "main_input_name", None)
    return {"pixel_values": True, "input_ids": False}.get(str(name))
