"""The pretrained models inside a composed one, as they are saved: where each is from, and whether training changed it.

A component that is as it was pretrained is named, like any backbone. One that is not lies in the folder, in the layout
of transformers, so that it can be read without what composed it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mixwright.backbones.cut import read_cut, write_cut
from mixwright.backbones.hf import load_backbone, load_tokenizer, without_bars
from mixwright.composition.ledger import Component, Entry, Ledger, open_ledger
from mixwright.errors import CatalogError
from mixwright.files import sha256_file
from mixwright.ops.digest import fingerprint, weights_digest

if TYPE_CHECKING:
    from mixwright.composition.model import ComposedModel

FOLDER = "components"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A component with what was written down about it when it was composed (`path`, `fingerprint`, `digest`, ...)."""

    name: str
    model: nn.Module
    origin: Mapping[str, Any]

    @property
    def is_cut(self) -> bool:
        """Whether it is only a part of what lies where it came from."""
        return "absent" in self.origin

    @property
    def changed(self) -> bool:
        """Whether it is no longer what lies where it came from: then its weights have to be kept."""
        if self.is_cut:
            return True
        if weights_digest(self.model) == self.origin.get("digest"):
            return False
        same_dtype = self.origin.get("dtype") in (None, dtype_of(self.model))
        return same_dtype or fingerprint(self.model) != self.origin["fingerprint"]


def parts_in(model: "ComposedModel") -> tuple[Part, ...]:
    """The components of a model, in the order of its experts; none where it stands on one backbone."""
    inside = getattr(model.backbone, "components", None)
    if not isinstance(inside, nn.ModuleList):
        return ()
    known = {str(entry["id"]): entry for entry in model.composition.experts}
    return tuple(
        Part(name=name, model=component, origin=known[name]["backbone"])
        for name, component in zip(model.experts, inside, strict=True)
    )


def ledger_of(model: "ComposedModel") -> Ledger:
    """The licence ledger of a model made of several; of one on a single backbone it is empty.

    Raises CatalogError (LICENCE) for every component whose licence nobody says; `licences` of its config states one.
    """
    listed = [
        Component(
            name=part.name,
            path=str(part.origin.get("path") or ""),
            fingerprint=str(part.origin["fingerprint"]),
            revision=part.origin.get("revision"),
            architecture=str(part.origin.get("architecture") or ""),
            used=model.acts_at(part.name),
        )
        for part in parts_in(model)
    ]
    known: Mapping[str, Entry] = model.composition.ledger
    return open_ledger(listed, model.composition.config.get("licences"), known)


def write_component(part: Part, folder: Path) -> None:
    """A component's config and weights, by its own `save_pretrained`: safetensors, tied weights once."""
    folder.mkdir(parents=True)
    if part.is_cut:
        write_cut(part.model, folder)
        return
    with without_bars():
        part.model.save_pretrained(folder)  # type: ignore[operator]


def read_component(
    folder: Path,
    name: str,
    listed: Mapping[str, Any],
    absent: Sequence[str] | None = None,
    *,
    dtype: Any,
    device_map: Any,
) -> nn.Module:
    """The component in a folder of a saved composition, whose files must be those that were `listed`.

    `absent`: the modules that it does not have, where it was cut.

    Raises CatalogError: PATH, HASH, VALUE, and whatever `load_backbone` says of a broken model.
    """
    there = {path.relative_to(folder).as_posix(): path for path in _files(folder, name)}
    wanted = {path.partition(f"{folder.name}/")[2]: record for path, record in listed.items()}
    if set(there) != set(wanted):
        odd = sorted(set(there) ^ set(wanted))[0]
        state = "missing" if odd in wanted else "not one that was written"
        raise CatalogError("PATH", name, f"{folder.name}/{odd[:80]} is {state}; copy the folder or download it again.")
    for file, path in there.items():
        if sha256_file(path) != wanted[file].get("sha256"):
            raise CatalogError("HASH", name, f"{folder.name}/{file[:80]} is not the file that was written.")
    if absent is None:
        model = load_backbone(folder, kind="causal", dtype=dtype, device_map=device_map)
    else:
        model = read_cut(folder, name, absent, dtype)
    for tensor, values in model.state_dict().items():
        if values.is_floating_point() and not torch.isfinite(values).all():
            raise CatalogError("VALUE", name, f"{tensor[:80]!r} holds NaN or infinite values.")
    return model


def write_tokenizer(model: "ComposedModel", folder: Path) -> None:
    """The tokenizer of a model made of several beside it."""
    tokenizer = tokenizer_of(model)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def tokenizer_of(model: "ComposedModel") -> Any:
    """The tokenizer of a model made of several: the one it was given, else that of a component's folder, or None."""
    if model.tokenizer is not None:
        return model.tokenizer
    for part in parts_in(model):
        path = str(part.origin.get("path") or "")
        try:
            if path:
                return load_tokenizer(path, revision=part.origin.get("revision"))
        except CatalogError:
            continue
    return None


def dtype_of(model: nn.Module) -> str | None:
    """Of a model's parameters, as it is written down."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _files(folder: Path, name: str) -> Iterator[Path]:
    if not folder.is_dir():
        raise CatalogError("PATH", name, f"there is no folder {folder.name}; copy the folder or download it again.")
    yield from (path for path in sorted(folder.rglob("*")) if not path.is_dir())
