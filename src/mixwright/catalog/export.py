"""LoRA factors written as the files that PEFT opens: the inverse of what `bundle` and `adapter` read."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

import torch
from safetensors.torch import save
from torch import Tensor

from mixwright.catalog.adapter import LoraFactors
from mixwright.catalog.card import CONFIG, GATES, SIGNATURES, WEIGHTS
from mixwright.catalog.document import render

Number = TypeVar("Number", int, float)
_PREFIX = "base_model.model."


def adapter_files(
    factors: Mapping[str, LoraFactors],
    peft_config: Mapping[str, Any],
    gates: Mapping[str, Tensor] | None = None,
    signatures: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> dict[str, bytes]:
    """The files of an expert by name.

    Rank, alpha and their patterns are worked out from `factors`, which keep their dtype; `peft_config` adds what they
    do not say (task_type, base_model_name_or_path, target_modules, use_rslora, fan_in_fan_out, lora_dropout).
    """
    if not factors:
        raise ValueError("an expert needs the factors of at least one site; got none.")
    tensors: dict[str, Tensor] = {}
    for path, factor in factors.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = _plain(factor.down)
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = _plain(factor.up)
    files = {CONFIG: render(config_for(factors, peft_config)), WEIGHTS: save(tensors, metadata={"format": "pt"})}
    return files | side_files(gates, signatures)


def side_files(
    gates: Mapping[str, Tensor] | None = None, signatures: Mapping[str, Mapping[str, Tensor]] | None = None
) -> dict[str, bytes]:
    """gate.safetensors and signature.safetensors, those of them that are given, in float32."""
    files: dict[str, bytes] = {}
    if gates is not None:
        files[GATES] = save({path: _plain(gate).float() for path, gate in gates.items()})
    if signatures is not None:
        flat = {
            f"{path}/{name}": _plain(value).float() for path, site in signatures.items() for name, value in site.items()
        }
        files[SIGNATURES] = save(flat)
    return files


def config_for(factors: Mapping[str, LoraFactors], peft_config: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter_config.json with which PEFT rebuilds these factors: commonest rank and alpha, patterns for others."""
    rslora = bool(peft_config.get("use_rslora", False))
    ranks = {path: factor.down.shape[0] for path, factor in factors.items()}
    alphas = {path: _alpha(factor.scale, ranks[path], rslora) for path, factor in factors.items()}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    return {
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "revision": None,
        "target_modules": sorted(factors),
        "task_type": None,
        **{key: _listed(value) for key, value in peft_config.items()},
        "alpha_pattern": {path: value for path, value in sorted(alphas.items()) if value != alpha},
        "lora_alpha": alpha,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {path: value for path, value in sorted(ranks.items()) if value != rank},
        "use_rslora": rslora,
    }


def _alpha(scale: float, rank: int, rslora: bool) -> int | float:
    alpha = scale * (math.sqrt(rank) if rslora else rank)
    whole = round(alpha)
    return whole if math.isclose(alpha, whole, rel_tol=1e-9) else alpha


def _listed(value: Any) -> Any:
    """PEFT's own configuration objects hold sets of names, which JSON does not have."""
    return sorted(cast("set[str]", value)) if isinstance(value, set) else value


def _commonest(values: Iterable[Number]) -> Number:
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
