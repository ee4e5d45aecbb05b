"""A composition on disk: four files in a folder that appears whole or not at all. The backbone is named, not copied.

One that is made of several models has more beside them: components that training changed, the licence ledger with
NOTICE and texts, and the tokenizer.

`composition.yaml` says what it is, `added.safetensors` holds every tensor that is not the backbone's,
`experts.lock.json` says where each expert came from and what its bytes were, and `README.md` is the card for people
and for the hub.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mixwright.catalog.document import render
from mixwright.composition.card import card_text
from mixwright.composition.component_card import components_card
from mixwright.composition.components import FOLDER as COMPONENTS
from mixwright.composition.components import Part, dtype_of, ledger_of, parts_in, write_component, write_tokenizer
from mixwright.composition.ledger import Ledger
from mixwright.config import encode
from mixwright.errors import CatalogError
from mixwright.files import sha256_file, staged_folder, write_new
from mixwright.ops.digest import fingerprint
from mixwright.yaml12 import write_yaml

if TYPE_CHECKING:
    from mixwright.composition.model import ComposedModel

FORMAT = 1
COMPOSITION = "composition.yaml"
_IF_ANY = ("components", "forbidden", "frozen")
ADDED = "added.safetensors"
LOCK = "experts.lock.json"
CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class StoredBackbone:
    """The backbone of a saved composition: where to get it, and how to know it again."""

    path: str
    """Folder or hub id; empty for a model that was built in memory, which the loader must be given."""
    fingerprint: str
    """See `ops.digest.fingerprint`."""
    revision: str | None = None
    """Commit on the hub."""
    kind: str = "auto"
    """causal, seq2seq, speech, encoder or auto."""
    architecture: str = ""
    """Class of the model."""
    dtype: str | None = None
    """Of its parameters when the composition was saved."""


@dataclass(frozen=True, kw_only=True)
class StoredComponent:
    """One of several pretrained models that a saved composition is made of."""

    name: str
    """Its expert id."""
    backbone: StoredBackbone
    """As it was pretrained."""
    folder: str | None = None
    """Where its weights lie beside this file; null where they are as pretrained."""
    fingerprint: str | None = None
    """Of the weights in `folder`."""
    absent: tuple[str, ...] | None = None
    """Modules that were cut away because nobody reads them; null for a component that is whole."""


@dataclass(frozen=True, kw_only=True)
class StoredComposition:
    """The content of `composition.yaml`."""

    format: int
    """Version of this layout."""
    mixwright: str
    """Version of the package that wrote it."""
    method: str
    """Name of the method that composed it."""
    backbone: StoredBackbone
    """What it stands on."""
    pool: tuple[str, ...]
    """Expert ids in the order of the routers' outputs."""
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    """The method's configuration."""
    active: tuple[str, ...] | None = None
    """Experts that the routers may choose; null: all."""
    forbidden: tuple[str, ...] = ()
    """Parameters of the backbone that a person keeps as pretrained, by name."""
    frozen: tuple[str, ...] = ()
    """Experts that a person keeps as they are through further training."""
    components: tuple[StoredComponent, ...] = ()
    """The pretrained models that the backbone is made of, in the order of `pool`; none where it is one model."""


def save(model: "ComposedModel", folder: Path) -> None:
    """Write `model` as a folder. An earlier composition there is replaced at one instant; anything else is refused.

    Raises CatalogError (`PATH`) for a folder that holds other things, (`DISK_FULL`) where there is no room.
    """
    folder = folder.absolute()
    taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if taken and not (folder / COMPOSITION).is_file():
        raise CatalogError("PATH", str(folder), "this is in use and holds no composition; give a new or empty folder.")
    with staged_folder(folder, replace=taken) as staging:
        write_files(model, staging)
        for path in staging.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors' own files are the owner's alone


def write_files(model: "ComposedModel", folder: Path) -> None:
    """The files, into an empty folder. Raises CatalogError (LICENCE) where nobody says a component's licence."""
    from safetensors.torch import save_file

    ledger = ledger_of(model)
    save_file(_separate(model.added_state()), folder / ADDED, metadata={"format": "pt"})
    stored = stored_composition(model)
    if stored.components:
        _write_components(model, stored, ledger, folder)
    write_new(folder / COMPOSITION, write_yaml(encoded(stored)).encode())
    write_new(folder / LOCK, render(_lock(model, folder)))
    card = components_card(stored, model.composition, ledger) if stored.components else None
    write_new(folder / CARD, (card or card_text(stored, model.composition, model.card_lines())).encode())


def _write_components(model: "ComposedModel", stored: StoredComposition, ledger: Ledger, folder: Path) -> None:
    for component, part in zip(stored.components, parts_in(model)):
        if component.folder is not None:
            write_component(part, folder / component.folder)
    for name, data in ledger.files().items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_new(folder / name, data)
    write_tokenizer(model, folder)


def encoded(stored: StoredComposition) -> dict[str, Any]:
    """As plain data, without the parts that most compositions have none of."""
    plain = encode(stored)
    return {key: value for key, value in plain.items() if value or key not in _IF_ANY}


def stored_composition(model: "ComposedModel") -> StoredComposition:
    """What `composition.yaml` says of a model."""
    known = model.composition.backbone
    return StoredComposition(
        format=FORMAT,
        mixwright=_version(),
        method=model.composition.method,
        backbone=_stored_backbone(known, model.fingerprint, model.backbone),
        pool=model.experts,
        config=dict(model.composition.config),
        active=None if model.active == model.experts else model.active,
        forbidden=model.forbidden,
        frozen=model.frozen_experts,
        components=tuple(_stored_component(at, part) for at, part in enumerate(parts_in(model))),
    )


def _stored_backbone(known: Mapping[str, Any], mark: str, model: nn.Module) -> StoredBackbone:
    return StoredBackbone(
        path=str(known.get("path") or ""),
        fingerprint=mark,
        revision=known.get("revision"),
        kind=str(known.get("kind") or "auto"),
        architecture=str(known.get("architecture") or type(model).__name__),
        dtype=dtype_of(model),
    )


def _stored_component(at: int, part: Part) -> StoredComponent:
    origin = _stored_backbone(part.origin, str(part.origin["fingerprint"]), part.model)
    if not part.changed:
        return StoredComponent(name=part.name, backbone=origin)
    kept, mark = f"{COMPONENTS}/{at}", fingerprint(part.model)
    absent = tuple(part.origin["absent"]) if part.is_cut else None
    return StoredComponent(name=part.name, backbone=origin, folder=kept, fingerprint=mark, absent=absent)


def push(
    model: "ComposedModel",
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a composition",
    token: str | None = None,
    client: Any = None,
) -> str:
    """Save `model` and upload the folder to the hub as one commit; returns its address. `client`: an `HfApi`."""
    if client is None:
        from huggingface_hub import HfApi

        client = HfApi(token=token)
    with tempfile.TemporaryDirectory(prefix="mixwright-") as place:
        folder = Path(place) / "composition"
        save(model, folder)
        client.create_repo(repo_id, private=private, repo_type="model", exist_ok=True)
        return str(
            client.upload_folder(
                repo_id=repo_id, folder_path=str(folder), revision=revision, commit_message=commit_message
            )
        )


def _lock(model: "ComposedModel", folder: Path) -> dict[str, Any]:
    """Each expert's source, licence and files with their SHA-256, and the digest of the added tensors."""
    kept = ("id", "licence", "task", "source", "backbone", "base_model", "files")
    inside = sorted(path for path in (folder / COMPONENTS).rglob("*") if path.is_file())
    return {
        "format": FORMAT,
        "added": {ADDED: _record(folder / ADDED)},
        "experts": [{key: expert[key] for key in kept if key in expert} for expert in model.composition.experts],
        **({"components": {p.relative_to(folder).as_posix(): _record(p) for p in inside}} if inside else {}),
    }


def _record(file: Path) -> dict[str, Any]:
    return {"sha256": sha256_file(file), "bytes": file.stat().st_size}


def _separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory, as safetensors wants them, on the CPU."""
    owned: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in state.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in owned or storage.nbytes() != plain.numel() * plain.element_size():
            plain = plain.clone()
        owned.add(plain.untyped_storage().data_ptr())
        separate[name] = plain
    return separate


def _version() -> str:
    try:
        return version("mixwright")
    except PackageNotFoundError:
        import mixwright

        return mixwright.__version__
