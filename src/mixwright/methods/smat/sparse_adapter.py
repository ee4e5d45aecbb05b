"""One adaptation as a sparse adapter for PEFT: SHiRA, a sparse change of linear layers' weights."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from mixwright.catalog.document import render
from mixwright.composition.card import plain
from mixwright.files import staged_folder, write_new
from mixwright.methods.smat.exporting import (
    Asked,
    ExportedPool,
    adaptation_card,
    apart,
    on_cpu,
    recorded,
    write_beside,
)

if TYPE_CHECKING:
    from mixwright.methods.smat.model import FewShotModel

_ADAPTER, _ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."


def export_peft(model: "FewShotModel", support: Asked, folder: Path, strength: float | None = None) -> ExportedPool:
    """Write the change as a sparse adapter (SHiRA, Bhardwaj et al. 2024) that PEFT opens on the untouched backbone.

    SHiRA holds sparse changes of linear layers' weights. Whatever else changes (biases, norms, embeddings) lies in the
    adapter as whole modules, named in `ExportedPool.whole`. Raises ValueError for changes that it has no form for: a
    parameter that the model itself holds, tied weights, and linear weights of which more changes than it can say.
    """
    with model.adapted(support, strength) as routing:
        before, after = model.pristine(), dict(model.backbone.named_parameters())
        changed = {name: after[name].detach() for name in after if not torch.equal(after[name], before[name])}
        linear, whole = _forms(model.backbone, changed)
        if not linear:
            raise ValueError(
                "no linear layer's weight changes alone: there is nothing sparse to write; take a state dict."
            )
        tensors, rank = _sparse(linear, before, changed)
        for path in whole:
            module = model.backbone.get_submodule(path)
            tensors |= {f"{_PREFIX}{path}.{name}": on_cpu(tensor) for name, tensor in module.state_dict().items()}
        record, exported = recorded(model, support, routing, strength, folder)
        with staged_folder(folder) as staging:
            write_new(staging / _ADAPTER, save(apart(tensors), metadata={"format": "pt"}))
            write_new(staging / _ADAPTER_CONFIG, render(_peft_config(model, linear, whole, rank)))
            write_beside(model, support, record, staging, _peft_card(model, record, whole))
    return ExportedPool(folder=folder, tensors=exported.tensors, numbers=exported.numbers, whole=whole)


def _peft_config(model: "FewShotModel", linear: Iterable[str], whole: Iterable[str], rank: int) -> dict[str, Any]:
    return {
        "peft_type": "SHIRA",
        "task_type": None,
        "base_model_name_or_path": model.composition.backbone.get("path") or None,
        "revision": model.composition.backbone.get("revision"),
        "inference_mode": True,
        "r": rank,
        "mask_type": "random",
        "random_seed": 0,
        "init_weights": True,
        "fan_in_fan_out": False,
        "target_modules": sorted(linear),
        "modules_to_save": [f"{_PREFIX}{path}" for path in whole] or None,
    }


def _forms(backbone: nn.Module, changed: Mapping[str, Tensor]) -> tuple[dict[str, nn.Linear], tuple[str, ...]]:
    """The linear layers whose weight alone changes, by path, and the modules that must be kept whole."""
    shared: dict[int, list[str]] = {}
    for name, parameter in backbone.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
    linear: dict[str, nn.Linear] = {}
    owners: set[str] = set()
    for name in changed:
        twins = shared[id(backbone.get_parameter(name))]
        if len(twins) > 1:
            raise ValueError(f"{' and '.join(twins)} are one tensor, which an adapter can't change; take a state dict.")
        path, _, part = name.rpartition(".")
        module = backbone.get_submodule(path)
        if part == "weight" and type(module) is nn.Linear:
            linear[path] = module
        elif path:
            owners.add(path)
        else:
            raise ValueError(f"{name} belongs to the model itself, which an adapter can't change; take a state dict.")
    whole = {path for path in owners if not any(path != other and _inside(path, other) for other in owners)}
    return {p: m for p, m in linear.items() if not any(_inside(p, other) for other in whole)}, tuple(sorted(whole))


def _inside(path: str, other: str) -> bool:
    return path == other or path.startswith(f"{other}.")


def _sparse(
    linear: Mapping[str, nn.Linear], before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], int]:
    """SHiRA's tensors and its `r`: each layer has r (d_in + d_out) entries, those that nothing needs being zeros."""
    entries: dict[str, tuple[Tensor, Tensor]] = {}
    rank = 1
    for path, module in linear.items():
        change = after[f"{path}.weight"].float() - before[f"{path}.weight"].float()
        places = change.nonzero().T
        entries[path] = (places, change[places[0], places[1]])
        rank = max(rank, -(-places.shape[1] // (module.in_features + module.out_features)))
    tensors: dict[str, Tensor] = {}
    for path, module in linear.items():
        d_in, d_out = module.in_features, module.out_features
        count = rank * (d_in + d_out)
        if count > d_in * d_out:
            raise ValueError(
                f"{path}.weight: SHiRA gives every layer {rank} * (d_in + d_out) entries, which the layer that changes "
                f"most needs, and this one has {d_in * d_out} weights. Take a state dict, or a sparser pool."
            )
        places, values = entries[path]
        padding = count - len(values)
        tensors[f"{_PREFIX}{path}.shira_indices"] = on_cpu(nn.functional.pad(places, (0, padding))).int()
        tensors[f"{_PREFIX}{path}.shira_weight"] = on_cpu(nn.functional.pad(values, (0, padding)))
    return tensors, rank


def _peft_card(model: "FewShotModel", record: Mapping[str, Any], whole: tuple[str, ...]) -> str:
    kept = f" These modules are kept whole: {', '.join(map(plain, whole))}." if whole else ""
    load = 'peft.PeftModel.from_pretrained(backbone, "this-folder")'
    return adaptation_card(model, record, "peft", load, f"A sparse change (SHiRA) of linear weights.{kept}")
