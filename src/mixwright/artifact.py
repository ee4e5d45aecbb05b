"""A saved composition becomes a model again: its folder is checked, its backbone recognised, its mixtures put back."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixwright import config as configuration
from mixwright.backbones.hf import fetch, load_backbone
from mixwright.catalog.document import parse
from mixwright.composition.base_digests import first_difference
from mixwright.composition.components import FOLDER as COMPONENTS
from mixwright.composition.components import read_component
from mixwright.composition.ledger import LEDGER, TEXTS, read_entries
from mixwright.composition.model import ComposedModel, Composition
from mixwright.composition.restoring import of_whole
from mixwright.composition.saving import (
    ADDED,
    COMPOSITION,
    FORMAT,
    LOCK,
    StoredBackbone,
    StoredComponent,
    StoredComposition,
)
from mixwright.errors import CatalogError, IncompatibleExpert
from mixwright.files import read_regular, sha256_bytes
from mixwright.methods.base import Method
from mixwright.methods.base import load as load_method
from mixwright.ops.digest import fingerprint
from mixwright.yaml12 import parse_yaml

Given = nn.Module | str | Path
_FILES = (COMPOSITION, ADDED, LOCK, LEDGER, f"{COMPONENTS}/*", f"{TEXTS}/*", "tokenizer*", "special_tokens*", "*.jinja")
_HEADER_LIMIT = 1 << 24
_TEXT_LIMIT = 1 << 24
_ADDED_LIMIT = 1 << 40
_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "I64", "BOOL"})
_TABLE_DTYPES = _DTYPES | {"I8", "U8"}


def load(
    folder_or_repo: str | Path,
    *,
    backbone: Given | Sequence[Given | None] | None = None,
    revision: str | None = None,
    device_map: Any = None,
    dtype: torch.dtype | str | None = None,
) -> ComposedModel:
    """The model that `save_pretrained` wrote, from its folder or a hub repository (at `revision`).

    `backbone`: a model, folder or hub id to use in place of the one that the composition names; it must be the same
    backbone (its fingerprint is compared). Where it stands on several: a list of them in the order of its components,
    None for one that is to be found by itself; those whose weights lie in the folder are always read there. Routing is
    the same as before saving, to the bit where the dtype is.
    Raises CatalogError: PATH, JSON, CONFIG, VERSION, HASH, HEADER, DTYPE, VALUE, TENSOR, SHAPE for a folder that is
    not what was written; IncompatibleExpert (BASE) for another backbone. A backbone that was given is then unchanged.
    """
    name = str(folder_or_repo)
    folder = fetch(folder_or_repo, revision, _FILES)
    stored = read_composition(folder, name)
    card, settings = _method(stored, name)
    lock = parse(_read(folder, LOCK, name), f"{name}/{LOCK}")
    state = read_added(folder, lock, name)
    if stored.components:
        model = _several(stored, folder, lock, backbone, {"device_map": device_map, "dtype": dtype}, name)
    else:
        model = _backbone(stored.backbone, _one(backbone), device_map, dtype)
        _recognise(model, stored.backbone, name, of_whole(state)[1])
    composed = card.restore(settings, model, state, stored.pool)
    composed.composition = Composition(
        method=stored.method,
        config=stored.config,
        backbone={f.name: getattr(stored.backbone, f.name) for f in fields(stored.backbone)},
        experts=tuple(lock.get("experts", ())),
        citation=card.paper.bibtex,
        ledger=read_entries(folder) if stored.components else {},
    )
    _all_used(composed, state, name)
    try:
        if stored.active is not None:
            composed.set_active([expert for expert in stored.active if expert in composed.experts])
        composed.restrain(stored.forbidden, stored.frozen)
    except ValueError as error:
        composed.remove()
        raise CatalogError("CONFIG", name, str(error)[:400]) from error
    return composed


def stored_at(folder_or_repo: str | Path, revision: str | None = None) -> StoredComposition:
    """What a saved composition says of itself. Raises CatalogError: PATH, CONFIG, VERSION."""
    folder = fetch(folder_or_repo, revision, (COMPOSITION, ADDED, LOCK))
    return read_composition(folder, str(folder_or_repo))


def read_composition(folder: Path, name: str) -> StoredComposition:
    """`composition.yaml`, strictly. Raises CatalogError: PATH, CONFIG, VERSION."""
    data = _read(folder, COMPOSITION, name)
    try:
        raw = parse_yaml(data.decode(), COMPOSITION)
        if isinstance(raw, dict) and raw.get("format") != FORMAT:
            raise CatalogError(
                "VERSION",
                name,
                f"format {str(raw.get('format'))[:20]} of {COMPOSITION}; this mixwright reads {FORMAT}.",
            )
        return configuration.decode(StoredComposition, raw, where=COMPOSITION)
    except ValueError as error:
        raise CatalogError("CONFIG", name, str(error)[:400]) from error


def _method(stored: StoredComposition, name: str) -> tuple[Method, Any]:
    try:
        card = load_method(stored.method)
        return card, configuration.decode(card.config, stored.config, where=f"{COMPOSITION}: config")
    except ValueError as error:
        raise CatalogError("CONFIG", name, str(error)[:400]) from error


def read_added(folder: Path, lock: dict[str, Any], name: str) -> dict[str, Tensor]:
    """The added tensors. Read once: hashed, their header checked, then parsed out of the same bytes.

    Raises CatalogError: PATH, HASH, HEADER, DTYPE, VALUE.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as parse_tensors

    data = _read(folder, ADDED, name, _ADDED_LIMIT)
    listed: Any = lock.get("added")
    record: Any = listed.get(ADDED) if isinstance(listed, dict) else None
    if not isinstance(record, dict):
        raise CatalogError("CONFIG", name, f"{LOCK} says nothing of {ADDED}; copy the folder or download it again.")
    if sha256_bytes(data) != record.get("sha256"):
        raise CatalogError(
            "HASH", name, f"{ADDED} is not the file that {LOCK} was written for; copy the folder or download it again."
        )
    where = f"{name}/{ADDED}"
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(_HEADER_LIMIT, len(data) - 8):
        raise CatalogError("HEADER", where, f"its header claims {length} bytes; it is cut off or no safetensors file.")
    header = parse(data[8 : 8 + length], where, code="HEADER")
    for tensor, entry in header.items():
        accepted = _TABLE_DTYPES if ".table." in tensor or ".packed." in tensor else _DTYPES
        if tensor != "__metadata__" and (not isinstance(entry, dict) or entry.get("dtype") not in accepted):
            raise CatalogError("DTYPE", where, f"{tensor[:80]!r} has a dtype that no composition has.")
    try:
        state = parse_tensors(data)
    except SafetensorError as error:
        raise CatalogError("HEADER", where, f"it can't be read ({str(error)[:120]}).") from error
    for tensor, values in state.items():
        if values.is_floating_point() and not torch.isfinite(values).all():
            raise CatalogError("VALUE", where, f"{tensor[:80]!r} holds NaN or infinite values.")
    return state


def _read(folder: Path, file: str, name: str, limit: int = _TEXT_LIMIT) -> bytes:
    try:
        return read_regular((folder / file).resolve(), limit)
    except FileNotFoundError as error:
        raise CatalogError(
            "PATH", name, f"there is no {file}; expected a folder that save_pretrained wrote."
        ) from error


def _several(
    stored: StoredComposition, folder: Path, lock: dict[str, Any], given: Any, placed: dict[str, Any], name: str
) -> nn.ModuleList:
    """The components, in order; each is what it was."""
    count = len(stored.components)
    listed: Any = [None] * count if given is None else given
    if isinstance(listed, str | Path) or not isinstance(listed, Sequence | nn.ModuleList) or len(listed) != count:
        names = ", ".join(component.name for component in stored.components)
        raise ValueError(f"backbone: this composition is made of {count} models ({names}); give a list of {count}.")
    if [component.name for component in stored.components] != list(stored.pool):
        raise CatalogError("CONFIG", name, f"{COMPOSITION}: the names of its components are not those of its pool.")
    parts = zip(stored.components, listed, strict=True)
    return nn.ModuleList(
        _component(at, component, folder, lock, one, placed, name) for at, (component, one) in enumerate(parts)
    )


def _component(
    at: int, stored: StoredComponent, folder: Path, lock: dict[str, Any], given: Any, placed: dict[str, Any], name: str
) -> nn.Module:
    where = f"{name}: component {stored.name!r}"
    if stored.folder is None:
        if given is None and not stored.backbone.path:
            raise ValueError(
                f"component {stored.name!r} was built in memory; pass it: load(folder, backbone=[...]), one for each "
                "component, None for those that are found by themselves."
            )
        model = _backbone(stored.backbone, given, **placed)
        _recognise(model, stored.backbone, where)
        return model
    if stored.folder != f"{COMPONENTS}/{at}":
        raise CatalogError("PATH", where, f"it says its weights lie in {stored.folder[:80]!r}, not {COMPONENTS}/{at}.")
    files = {file: known for file, known in _kept(lock, name).items() if file.startswith(f"{stored.folder}/")}
    wanted = {**placed, "dtype": placed["dtype"] or stored.backbone.dtype}
    model = read_component(folder / stored.folder, where, files, stored.absent, **wanted)
    kept = replace(stored.backbone, fingerprint=str(stored.fingerprint), path=stored.folder)
    _recognise(model, kept, where)
    return model


def _kept(lock: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    files: Any = lock.get("components")
    if not isinstance(files, dict) or not all(isinstance(known, dict) for known in files.values()):
        raise CatalogError("CONFIG", name, f"{LOCK} does not list the files of its components.")
    return files


def _one(given: Any) -> Any:
    if given is not None and not isinstance(given, nn.Module | str | Path):
        raise ValueError("backbone: this composition stands on one model; give a model, a folder or a hub id.")
    return given


def _backbone(stored: StoredBackbone, given: Any, device_map: Any, dtype: Any) -> nn.Module:
    if isinstance(given, nn.Module):
        return given
    if given is None and not stored.path:
        raise ValueError("the backbone of this composition was built in memory; pass it: load(folder, backbone=model).")
    return load_backbone(
        given or stored.path,
        revision=None if given is not None else stored.revision,
        dtype=dtype or stored.dtype,
        kind=stored.kind,
        device_map=device_map,
    )


def _recognise(
    backbone: nn.Module, stored: StoredBackbone, name: str, whole: Mapping[str, Tensor] | None = None
) -> None:
    """Refuse another backbone: by its fingerprint, and by every bit where `whole` holds the digests of its tensors."""
    found, differs = fingerprint(backbone), first_difference(whole or {}, backbone)
    if found != stored.fingerprint or differs is not None:
        where = "" if differs is None else f" The first that differs is {differs}."
        raise IncompatibleExpert(
            "BASE",
            name,
            f"it stands on {stored.architecture} {stored.path!r} with the fingerprint {stored.fingerprint}; this "
            f"backbone has {found}.{where} Give the backbone that it was composed on.",
        )


def _all_used(composed: ComposedModel, state: dict[str, Tensor], name: str) -> None:
    restored = {key: tuple(tensor.shape) for key, tensor in composed.added_state().items()}
    strange = sorted(set(restored.items()) ^ {(key, tuple(tensor.shape)) for key, tensor in state.items()})
    if strange:
        composed.remove()
        raise CatalogError(
            "TENSOR", name, f"{strange[0][0][:80]!r} was stored or restored alone; the folder is broken."
        )
