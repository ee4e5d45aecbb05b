"""Components of which only a part is left, on a disk: their config, and the tensors that they still have."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixwright.backbones.absent import leave_out
from mixwright.backbones.hf import build_as_described
from mixwright.backbones.parts import parts_of
from mixwright.errors import CatalogError

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def write_cut(model: nn.Module, folder: Path) -> None:
    """A model's config and its tensors, shared ones once."""
    from safetensors.torch import save_file

    config: Any = model.config
    (folder / CONFIG).write_text(config.to_json_string(use_diff=False), encoding="utf-8")
    unique = {tensor.data_ptr(): name for name, tensor in reversed(model.state_dict().items())}
    state = {name: tensor for name, tensor in model.state_dict().items() if unique[tensor.data_ptr()] == name}
    save_file({name: t.detach().cpu().contiguous() for name, t in state.items()}, folder / WEIGHTS, {"format": "pt"})


def read_cut(folder: Path, name: str, absent: Sequence[str], dtype: torch.dtype | str | None) -> nn.Module:
    """What `write_cut` wrote, of a model without the modules `absent`. It is read on the CPU.

    Raises CatalogError: SIZE, JSON, CONFIG, PATH, HEADER, INCOMPLETE, TENSOR, SHAPE.
    """
    model = build_as_described(folder, name)
    try:
        leave_out(model, parts_of(model, name), absent)
    except (AttributeError, KeyError) as error:
        raise CatalogError("CONFIG", name, f"{str(error)[:120]} is to be absent, and is no part of it.") from error
    own: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    stored = _tensors(folder, name)
    unknown = sorted(set(stored) - set(own))
    if unknown:
        raise CatalogError("TENSOR", name, f"{WEIGHTS} has {unknown[0][:80]!r}, of which its config knows nothing.")
    filled: set[int] = set()
    for key, tensor in stored.items():
        if tensor.shape != own[key].shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(own[key].shape)}"
            raise CatalogError("SHAPE", name, f"{key[:80]!r} has the shape {shapes}.")
        filled.add(id(own[key]))
        own[key].data = tensor
    missing = sorted(key for key, tensor in own.items() if id(tensor) not in filled)
    if missing:
        raise CatalogError("INCOMPLETE", name, f"{WEIGHTS} lacks {missing[0][:80]!r}; it would be random.")
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return (model if wanted is None else model.to(wanted)).eval()


def _tensors(folder: Path, name: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise CatalogError("HEADER", name, f"{WEIGHTS} can't be read ({str(error)[:120]}).") from error
