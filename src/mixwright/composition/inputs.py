"""Small random inputs for a model nobody has described to us, read off its config."""

from typing import Any

import torch
from torch import Tensor, nn

from mixwright.backbones.image_settings import image_channels, image_side, own_settings

SOURCE, TARGET = 7, 5
"""Tokens of an encoder's text and of the main stream: different, so that their activations can be told apart."""

_BATCH = 2


def example_inputs(model: nn.Module, seed: int = 0) -> dict[str, Tensor] | None:
    """Keyword arguments for one forward pass of `model`, on its device; None if its config does not tell them.

    Token ids for language models (with `decoder_input_ids` of another length where there is an encoder), pixels, audio
    features or a wave form for the others; pixels for a timm model, which has a config of its own.
    """
    draw = torch.Generator().manual_seed(seed)
    anchor = next(model.parameters(), torch.zeros(()))
    side = None if own_settings(model) is None else image_side(model)
    if side is not None:
        pixels = torch.randn(_BATCH, image_channels(model), side, side, generator=draw)
        return {"x": pixels.to(anchor.device, anchor.dtype)}
    config = getattr(model, "config", None)
    if config is None:
        return None
    name = str(getattr(model, "main_input_name", "input_ids"))
    main = _main_input(name, config, draw)
    if main is None:
        return None
    inputs = {name: main}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = _ids(config, TARGET, draw)
    return {
        key: value.to(anchor.device, anchor.dtype if value.is_floating_point() else value.dtype)
        for key, value in inputs.items()
    }


def _main_input(name: str, config: Any, draw: torch.Generator) -> Tensor | None:
    if name == "input_ids" and getattr(_text(config), "vocab_size", None):
        return _ids(config, SOURCE if getattr(config, "is_encoder_decoder", False) else TARGET, draw)
    if name == "pixel_values" and getattr(config, "image_size", None):
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return torch.randn(_BATCH, getattr(config, "num_channels", 3), height, width, generator=draw)
    if name == "input_features" and hasattr(config, "max_source_positions"):
        return torch.randn(_BATCH, config.num_mel_bins, 2 * config.max_source_positions, generator=draw)
    if name == "input_values":
        return torch.randn(_BATCH, 4000, generator=draw)
    return None


def _ids(config: Any, length: int, draw: torch.Generator) -> Tensor:
    top = int(_text(config).vocab_size)
    return torch.randint(min(4, top - 1), top, (_BATCH, length), generator=draw)


def _text(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config
