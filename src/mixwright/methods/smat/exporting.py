"""One adaptation for those who have no pool: plain weights, a folder that loads without this library, a PEFT adapter.

What is merged is merged in float32 and then cast to the backbone's dtype, as everywhere (`ops.interpolate`).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor

from mixwright.backbones.hf import without_bars
from mixwright.catalog.document import render
from mixwright.composition.card import plain
from mixwright.composition.route import Route
from mixwright.composition.saving import encoded, stored_composition
from mixwright.composition.support import Given
from mixwright.files import staged_folder, write_new
from mixwright.ops.digest import digest_of_tensor
from mixwright.ops.prototypes import class_means
from mixwright.routing import Routing

if TYPE_CHECKING:
    from mixwright.methods.smat.model import FewShotModel

MADE_FROM = "made_from.json"
PROTOTYPES = "prototypes.safetensors"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class ExportedPool:
    """What was written: the folder, how many tensors differ from the pretrained ones, and in how many numbers.

    `whole`: modules that a PEFT adapter holds whole, since it has no sparse form for what changes in them.
    """

    folder: Path
    tensors: int
    numbers: int
    whole: tuple[str, ...] = ()


Asked = Given | Route | Routing | str
"""What `EpisodicModel.commit` takes: a support set, a choice, or the name of an adaptation."""


def export_state(model: "FewShotModel", support: Asked, strength: float | None = None) -> dict[str, Tensor]:
    """The backbone's `state_dict` under the weights for a support set; copies, tied names included."""
    with model.adapted(support, strength):
        return {name: tensor.detach().clone() for name, tensor in model.backbone.state_dict().items()}


def export_folder(model: "FewShotModel", support: Asked, folder: Path, strength: float | None = None) -> ExportedPool:
    """Write the adapted backbone as its own library saves it, or as `model.safetensors` where it has none.

    Beside it: what it was made from, and the class prototypes of the support set under the new weights. The folder
    appears whole or not at all; CatalogError (PATH) for one that is in use.
    """
    with model.adapted(support, strength) as routing:
        record, exported = recorded(model, support, routing, strength, folder)
        with staged_folder(folder) as staging, without_bars():
            backbone: Any = model.backbone
            if hasattr(backbone, "save_pretrained"):
                backbone.save_pretrained(staging)
            else:
                write_new(staging / WEIGHTS, save(apart(backbone.state_dict()), metadata={"format": "pt"}))
            write_beside(model, support, record, staging, _whole_card(model, record))
    return exported


def recorded(
    model: "FewShotModel", support: Asked, routing: Routing, strength: float | None, folder: Path
) -> tuple[dict[str, Any], ExportedPool]:
    """What an export was made from, for anybody who wants to know later, and its counts; the weights stand adapted."""
    before, after = model.pristine(), dict(model.backbone.named_parameters())
    moved = {name: int((after[name] != before[name]).sum()) for name in after}
    pool = hashlib.sha256()
    for name, tensor in sorted(model.added_state().items()):
        pool.update(f"{name} {digest_of_tensor(tensor)}\n".encode())
    counts = {name: count for name, count in moved.items() if count}
    record: dict[str, Any] = {
        "composition": encoded(stored_composition(model)),
        "pool_sha256": pool.hexdigest(),
        "base_sha256": {name: digest_of_tensor(tensor) for name, tensor in sorted(before.items())},
        **_mixtures(model, routing),
        "strength": _strength(model, support, strength),
        "changed": counts,
    }
    return record, ExportedPool(folder=folder, tensors=len(counts), numbers=sum(counts.values()))


def _mixtures(model: "FewShotModel", routing: Routing) -> dict[str, Any]:
    """The weight of each expert; where blocks have mixtures of their own, the mean, and each block's."""
    experts = model.mixture.experts
    rows = experts.by_block(routing.dense())
    mean = experts.mean_over_blocks(rows)
    found: dict[str, Any] = {"weights_of_experts": dict(zip(model.experts, mean.tolist(), strict=True))}
    if experts.blocks:
        each = (dict(zip(model.experts, row, strict=True)) for row in rows.tolist())
        found["weights_by_block"] = dict(zip(experts.blocks, each, strict=True))
    return found


def _strength(model: "FewShotModel", support: Asked, strength: float | None) -> float:
    if strength is None:
        return model.remembered(support).strength if isinstance(support, str) else 1.0
    return strength


def write_beside(model: "FewShotModel", support: Asked, record: dict[str, Any], staging: Path, card: str) -> None:
    """What goes with any export: prototypes, what it was made from, and a card."""
    classes, prototypes = _prototypes(model, support)
    if prototypes is not None:
        write_new(staging / PROTOTYPES, save({"prototypes": on_cpu(prototypes)}, metadata={"format": "pt"}))
    write_new(staging / MADE_FROM, render(record | {"classes": list(classes)}))
    write_new(staging / "README.md", card.encode())


def _prototypes(model: "FewShotModel", support: Asked) -> tuple[tuple[str, ...], Tensor | None]:
    """Names and prototypes of the classes under the weights as they stand; none where no examples are known."""
    if isinstance(support, str):
        kept = model.remembered(support)
        return kept.classes, kept.prototypes
    if isinstance(support, Routing | Route):
        return (), None
    known = model.labelled(support)
    features = model.settled_features(known.support.inputs).float()
    return known.classes, class_means(features, known.support.labels, len(known.classes))


def _whole_card(model: "FewShotModel", record: Mapping[str, Any]) -> str:
    load = (
        f'transformers.{plain(type(model.backbone).__name__)}.from_pretrained("this-folder")'
        if hasattr(model.backbone, "save_pretrained")
        else f'model.load_state_dict(safetensors.torch.load_file("this-folder/{WEIGHTS}"))'
    )
    return adaptation_card(
        model, record, "transformers", load, "The weights are the whole model's; nothing else is needed."
    )


def adaptation_card(model: "FewShotModel", record: Mapping[str, Any], library: str, load: str, what: str) -> str:
    """README.md of an export: what it is, how `library` loads it, and the mixture."""
    base = plain(model.composition.backbone.get("path") or type(model.backbone).__name__)
    numbers = sum(record["changed"].values())
    mixture = "Mixture, the mean over blocks" if "weights_by_block" in record else "Mixture"
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
            f"{mixture}: {mixed}; strength {record['strength']:g}. `{PROTOTYPES}` has the mean feature of each class "
            f"of the examples under these weights: a query belongs to the class with the largest cosine "
            f"(features: `{plain(model.composition.config.get('features'))}`).",
            "",
        ]
    )


def apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies, so that names of one tensor can lie in one file."""
    return {name: on_cpu(tensor) for name, tensor in state.items()}


def on_cpu(tensor: Tensor) -> Tensor:
    """A copy there, contiguous."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
