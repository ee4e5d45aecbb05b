"""One adaptation for those who have no pool: plain weights, a folder that loads without this library, a PEFT adapter.

What is merged is merged in float32 and then cast to the backbone's dtype, as everywhere (`ops.interpolate`).
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from mixwright.backbones.eval_mode import eval_mode
from mixwright.backbones.hf import without_bars
from mixwright.catalog.document import render
from mixwright.composition.card import plain
from mixwright.composition.saving import stored_composition
from mixwright.config import encode
from mixwright.files import staged_folder, write_new
from mixwright.ops.digest import digest_of_tensor
from mixwright.ops.prototypes import class_means
from mixwright.routing import Routing, SupportSet

if TYPE_CHECKING:
    from mixwright.methods.smat.model import FewShotModel

MADE_FROM = "made_from.json"
PROTOTYPES = "prototypes.safetensors"
WEIGHTS = "model.safetensors"

_ADAPTER, _ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class ExportedPool:
    """What was written: the folder, how many tensors differ from the pretrained ones, and in how many numbers.

    `whole`: modules that a PEFT adapter holds whole, since it has no sparse form for what changes in them.
    """

    folder: Path
    tensors: int
    numbers: int
    whole: tuple[str, ...] = ()


def export_state(model: "FewShotModel", support: SupportSet | Routing, strength: float = 1.0) -> dict[str, Tensor]:
    """The backbone's `state_dict` under the weights for a support set; copies, tied names included."""
    with model.adapted(support, strength):
        return {name: tensor.detach().clone() for name, tensor in model.backbone.state_dict().items()}


def export_folder(
    model: "FewShotModel", support: SupportSet | Routing, folder: Path, strength: float = 1.0
) -> ExportedPool:
    """Write the adapted backbone as its own library saves it, or as `model.safetensors` where it has none.

    Beside it: what it was made from, and the class prototypes of the support set under the new weights. The folder
    appears whole or not at all; CatalogError (PATH) for one that is in use.
    """
    with model.adapted(support, strength) as routing:
        record, exported = _record(model, routing, strength, folder)
        with staged_folder(folder) as staging, without_bars():
            backbone: Any = model.backbone
            if hasattr(backbone, "save_pretrained"):
                backbone.save_pretrained(staging)
            else:
                write_new(staging / WEIGHTS, save(_apart(backbone.state_dict()), metadata={"format": "pt"}))
            _beside(model, support, record, staging, _whole_card(model, record))
    return exported


def export_peft(
    model: "FewShotModel", support: SupportSet | Routing, folder: Path, strength: float = 1.0
) -> ExportedPool:
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
            tensors |= {f"{_PREFIX}{path}.{name}": _cpu(tensor) for name, tensor in module.state_dict().items()}
        record, exported = _record(model, routing, strength, folder)
        with staged_folder(folder) as staging:
            write_new(staging / _ADAPTER, save(_apart(tensors), metadata={"format": "pt"}))
            write_new(staging / _ADAPTER_CONFIG, render(_peft_config(model, linear, whole, rank)))
            _beside(model, support, record, staging, _peft_card(model, record, whole))
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
                f"most needs, and this one has no more than {d_in * d_out} weights. Take a state dict, or a sparser pool."
            )
        places, values = entries[path]
        padding = count - len(values)
        tensors[f"{_PREFIX}{path}.shira_indices"] = _cpu(nn.functional.pad(places, (0, padding))).int()
        tensors[f"{_PREFIX}{path}.shira_weight"] = _cpu(nn.functional.pad(values, (0, padding)))
    return tensors, rank


def _record(
    model: "FewShotModel", routing: Routing, strength: float, folder: Path
) -> tuple[dict[str, Any], ExportedPool]:
    """What an export was made from, for anybody who wants to know later, and its counts; the weights stand adapted."""
    before, after = model.pristine(), dict(model.backbone.named_parameters())
    moved = {name: int((after[name] != before[name]).sum()) for name in after}
    pool = hashlib.sha256()
    for name, tensor in sorted(model.added_state().items()):
        pool.update(f"{name} {digest_of_tensor(tensor)}\n".encode())
    counts = {name: count for name, count in moved.items() if count}
    record: dict[str, Any] = {
        "composition": {key: value for key, value in encode(stored_composition(model)).items() if key != "components"},
        "pool_sha256": pool.hexdigest(),
        "base_sha256": {name: digest_of_tensor(tensor) for name, tensor in sorted(before.items())},
        "weights_of_experts": dict(zip(model.experts, routing.dense().tolist(), strict=True)),
        "strength": strength,
        "changed": counts,
    }
    return record, ExportedPool(folder=folder, tensors=len(counts), numbers=sum(counts.values()))


def _beside(
    model: "FewShotModel", support: SupportSet | Routing, record: dict[str, Any], staging: Path, card: str
) -> None:
    if isinstance(support, SupportSet):
        with eval_mode(model.backbone):
            features = model.features(support.inputs).float()
        means = class_means(features, support.labels, int(support.labels.max()) + 1)
        write_new(staging / PROTOTYPES, save({"prototypes": _cpu(means)}, metadata={"format": "pt"}))
    write_new(staging / MADE_FROM, render(record))
    write_new(staging / "README.md", card.encode())


def _whole_card(model: "FewShotModel", record: Mapping[str, Any]) -> str:
    load = (
        f'transformers.{plain(type(model.backbone).__name__)}.from_pretrained("this-folder")'
        if hasattr(model.backbone, "save_pretrained")
        else f'model.load_state_dict(safetensors.torch.load_file("this-folder/{WEIGHTS}"))'
    )
    return _card(model, record, "transformers", load, "The weights are the whole model's; nothing else is needed.")


def _peft_card(model: "FewShotModel", record: Mapping[str, Any], whole: tuple[str, ...]) -> str:
    kept = f" These modules are kept whole: {', '.join(map(plain, whole))}." if whole else ""
    load = 'peft.PeftModel.from_pretrained(backbone, "this-folder")'
    return _card(model, record, "peft", load, f"A sparse change (SHiRA) of linear weights.{kept}")


def _card(model: "FewShotModel", record: Mapping[str, Any], library: str, load: str, what: str) -> str:
    base = plain(model.composition.backbone.get("path") or type(model.backbone).__name__)
    numbers = sum(record["changed"].values())
    mixed = ", ".join(f"{plain(name)} {weight:.3f}" for name, weight in record["weights_of_experts"].items())
    return "\n".join(
        [
            f"---\nlibrary_name: {library}\ntags: [mixwright, few-shot]\n---",
            "",
            f"# {base}, adapted to one few-shot task",
            "",
            f"Made by mixwright out of a pool of sparse interpolated experts, without a gradient step. {what} "
            f"{numbers:,} numbers in {len(record['changed'])} tensors differ from `{base}`; `{MADE_FROM}` has the "
            "digest of every tensor that it was made from.",
            "",
            f"```python\n{load}\n```",
            "",
            f"Mixture: {mixed}; strength {record['strength']:g}. `{PROTOTYPES}` has the mean feature of each class of "
            f"the examples under these weights: a query belongs to the class with the largest cosine "
            f"(features: `{plain(model.composition.config.get('features'))}`).",
            "",
        ]
    )


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies, so that names of one tensor can lie in one file."""
    return {name: _cpu(tensor) for name, tensor in state.items()}


def _cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
