"""One routing of a composed model for those who have no router: a PEFT LoRA, or a backbone with it baked in."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixwright.backbones.hf import provenance, without_bars
from mixwright.catalog.adapter import LoraFactors
from mixwright.catalog.export import adapter_files
from mixwright.composition.card import adapter_card
from mixwright.composition.folding import fold, updates
from mixwright.composition.model import ComposedModel
from mixwright.files import staged_folder, write_new
from mixwright.routing import Condition
from mixwright.sites import linear_site

_TASK_TYPES = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "encoder": "FEATURE_EXTRACTION"}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written: the folder, and of a LoRA its one rank, the sites and the count of its numbers."""

    folder: Path
    rank: int
    sites: int
    numbers: int


def export_lora(model: ComposedModel, condition: Condition, folder: Path, title: str) -> Exported:
    """Write what `model` does in evaluation under `condition` as a folder that PEFT opens, exact in float32.

    Every site has the same rank and scale (smaller updates are padded with zeros), so that servers without rank
    patterns load it. The folder appears whole or not at all. Raises ValueError for a routing that varies (see `fold`),
    CatalogError (PATH) for a folder that is in use.
    """
    factors = _of_one_rank(updates(model, condition))
    rank = next(iter(factors.values())).down.shape[0]
    files = adapter_files(factors, _peft_config(model, factors))
    card = adapter_card(title, _described(model), model.composition)
    with staged_folder(folder) as staging:
        for name, data in {**files, "README.md": card.encode()}.items():
            write_new(staging / name, data)
    numbers = sum(factor.down.numel() + factor.up.numel() for factor in factors.values())
    return Exported(folder=folder, rank=rank, sites=len(factors), numbers=numbers)


def export_merged(model: ComposedModel, condition: Condition, folder: Path, tokenizer: Any = None) -> Exported:
    """Write the backbone with one routing in its weights, by its own `save_pretrained`, and the tokenizer beside it.

    Raises ValueError and CatalogError as `export_lora`.
    """
    merged = fold(model, condition)
    save = getattr(merged, "save_pretrained", None)
    if save is None:
        raise ValueError(f"{type(merged).__name__} has no save_pretrained; take the module from model.fold() instead.")
    with staged_folder(folder) as staging, without_bars():
        save(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
    numbers = sum(parameter.numel() for parameter in merged.parameters())
    return Exported(folder=folder, rank=0, sites=len(model.mixtures), numbers=numbers)


def _of_one_rank(found: Mapping[str, LoraFactors]) -> dict[str, LoraFactors]:
    """The factors in float32, all of the largest rank, at one scale."""
    rank = max(factor.down.shape[0] for factor in found.values())
    return {path: _padded(factor, rank) for path, factor in found.items()}


def _padded(factor: LoraFactors, rank: int) -> LoraFactors:
    """The same update, of this rank, at the scale 1 / rank."""
    missing = rank - factor.down.shape[0]
    down = nn.functional.pad(factor.down, (0, 0, 0, missing))
    up = nn.functional.pad(factor.up * (factor.scale * rank), (0, missing))
    return LoraFactors(_float32(down), _float32(up), 1 / rank)


def _float32(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32)


def _peft_config(model: ComposedModel, sites: Mapping[str, LoraFactors]) -> dict[str, Any]:
    """What PEFT asks beyond the factors. Names are whole paths, so that no other layer is meant."""
    known = _described(model)
    specs = (linear_site(site, mixture.base) for site, mixture in model.mixtures.items() if mixture.base is not None)
    return {
        "task_type": _TASK_TYPES.get(str(known.get("kind"))),
        "base_model_name_or_path": known.get("path") or None,
        "revision": known.get("revision"),
        "target_modules": sorted(sites),
        "fan_in_fan_out": any(spec is not None and spec.transposed for spec in specs),
    }


def _described(model: ComposedModel) -> dict[str, Any]:
    """The backbone as the composition wrote it down, or as it says of itself."""
    return {**provenance(model.backbone), **model.composition.backbone, "fingerprint": model.fingerprint}
