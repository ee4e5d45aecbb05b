"""The files of a catalogue: one folder per expert, and catalog.json for what is true of all of them.

    catalog.json               format, backbone (fingerprint and name), states other than active; sealed
    experts/<id>/              a PEFT adapter folder with card.json, gate.safetensors and signature.safetensors if any
    .lock .staging/ .trash/    a writer's

Each change is one rename: of an expert's folder, or of catalog.json. Readers take no lock and see the old or the new.
A writer that dies leaves files in .staging or .trash only; the next one clears them.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from mixwright.catalog.card import RESERVED, State, check_id, seal, unseal
from mixwright.catalog.document import render
from mixwright.catalog.folder import Folder, open_folder
from mixwright.catalog.refusal import quote, refuse, show
from mixwright.errors import CatalogError
from mixwright.files import (
    disk_full,
    exclusive_lock,
    is_full,
    publish_folder,
    read_regular,
    replace_folder,
    room_for,
    withdraw_folder,
    write_atomic,
    write_new,
)

MANIFEST = "catalog.json"
FORMAT = 1
MAX_MANIFEST = 16 * 1024 * 1024
Result = TypeVar("Result")
_OURS = {MANIFEST, "experts", ".lock", ".staging", ".trash"}


@dataclass(frozen=True, kw_only=True)
class Binding:
    """The backbone that a catalogue is for."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    fingerprint: str
    name: str | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What catalog.json says. An expert without a state is active."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    backbone: Binding | None = None
    states: dict[str, Literal["disabled", "retired"]] = field(default_factory=dict[str, Literal["disabled", "retired"]])
    format: int = FORMAT

    def state(self, expert_id: str) -> State:
        """The state of an expert that is there."""
        return self.states.get(expert_id, "active")


class Shelf:
    """The folder of a catalogue; it need not exist before the first write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.experts = folder / "experts"
        self.where = f"catalogue {quote(folder.name)}"

    def exists(self) -> bool:
        """Whether something was ever written here."""
        return (self.folder / MANIFEST).exists()

    def manifest(self) -> Manifest:
        """What catalog.json says. Raises CatalogError: CATALOG, VERSION, HASH, JSON."""
        try:
            data = read_regular(self.folder / MANIFEST, MAX_MANIFEST)
        except (FileNotFoundError, NotADirectoryError):
            self._check_empty()
            return Manifest()
        value = unseal(data, self.where)
        if value.get("format") != FORMAT:
            found = show(str(value.get("format")))
            raise refuse("VERSION", self.where, f"format {found}; this release reads {FORMAT}. Use a later mixwright.")
        try:
            return TypeAdapter(Manifest).validate_json(render(value))
        except ValidationError as error:
            raise refuse("CATALOG", self.where, f"{MANIFEST}: {error.errors()[0]['msg']}. Restore a copy.") from None

    def ids(self) -> tuple[str, ...]:
        """The experts that are there, in order."""
        if not self.exists():
            self._check_empty()
        try:
            entries = sorted(entry.name for entry in os.scandir(self.experts) if entry.is_dir(follow_symlinks=False))
        except (FileNotFoundError, NotADirectoryError):
            return ()
        return tuple(name for name in entries if _is_id(name))

    def require(self, expert_id: str) -> None:
        """Raises CatalogError (MISSING) for an expert that is not there."""
        if expert_id not in self.ids():
            known = ", ".join(self.ids()[:8]) or "none"
            raise refuse("MISSING", f"expert {quote(expert_id)}", f"it is not in {self.where}, which has: {known}.")

    def read(self, expert_id: str, reader: Callable[[Folder], Result]) -> Result:
        """What `reader` makes of an expert's folder; once more if a writer exchanged or took the folder meanwhile.

        Raises CatalogError: MISSING, HASH for a file that is gone, and what `reader` raises.
        """
        where = f"expert {quote(expert_id)}"
        while True:
            self.require(expert_id)
            before = self._identity(expert_id)
            try:
                with open_folder(self.experts / expert_id, where) as folder:
                    return reader(folder)
            except (FileNotFoundError, CatalogError) as error:
                if self._identity(expert_id) != before:
                    continue
                if isinstance(error, CatalogError):
                    raise
                name = quote(str(error.filename))
                raise refuse("HASH", where, f"its file {name} is missing. Restore it, or remove the expert.") from None

    def _identity(self, expert_id: str) -> tuple[int, int] | None:
        try:
            status = os.stat(self.experts / expert_id, follow_symlinks=False)
        except OSError:
            return None
        return status.st_ino, status.st_ctime_ns

    @contextlib.contextmanager
    def writing(self) -> Generator[Manifest, None, None]:
        """Hold the lock, with the remains of dead writers cleared; gives the manifest as it is under the lock.

        Raises CatalogError: LOCKED, DISK_FULL, READ_ONLY, and what `manifest` raises.
        """
        try:
            self.manifest()
            self.experts.mkdir(parents=True, exist_ok=True)
            with exclusive_lock(self.folder / ".lock"):
                self._clear()
                if not self.exists():
                    self.write_manifest(Manifest())
                yield self.manifest()
        except OSError as error:
            if is_full(error):
                raise disk_full(self.folder, 4096) from None
            raise refuse(
                "READ_ONLY", self.where, f"it cannot be written ({error.strerror}). Nothing was changed."
            ) from None

    def write_manifest(self, manifest: Manifest) -> None:
        """Replace catalog.json. Call it while writing."""
        write_atomic(self.folder / MANIFEST, seal(asdict(manifest)))

    def publish(self, expert_id: str, files: Mapping[str, bytes]) -> None:
        """Make a new expert's folder appear, whole. Call it while writing."""
        with self._staged(expert_id, files) as staging:
            publish_folder(staging, self.experts / expert_id)

    def replace(self, expert_id: str, files: Mapping[str, bytes]) -> None:
        """Exchange an expert's folder for another in one step. Call it while writing."""
        with self._staged(expert_id, files) as staging:
            replace_folder(staging, self.experts / expert_id)

    def discard(self, expert_id: str) -> None:
        """Take an expert's folder away in one step. Call it while writing."""
        trash = self.folder / ".trash"
        trash.mkdir(exist_ok=True)
        withdraw_folder(self.experts / expert_id, trash / f"{expert_id}@{secrets.token_hex(4)}")
        self._clear()

    def move(self, expert_id: str, allowed: set[State], state: State, otherwise: str) -> None:
        """Change an expert's state. Raises CatalogError: MISSING, or STATE with the reason `otherwise`."""
        with self.writing() as manifest:
            self.require(expert_id)
            if manifest.state(expert_id) not in allowed:
                raise refuse("STATE", f"expert {quote(expert_id)}", f"{otherwise}.")
            self.set_state(manifest, expert_id, state)

    def set_state(self, manifest: Manifest, expert_id: str, state: State) -> None:
        """Write a state down; those of experts that are no more are dropped. Call it while writing."""
        present = set(self.ids())
        states: dict[str, Literal["disabled", "retired"]] = {
            one: known for one, known in manifest.states.items() if one in present and one != expert_id
        }
        if state != "active":
            states[expert_id] = state
        if states != manifest.states:
            self.write_manifest(replace(manifest, states=states))

    @contextlib.contextmanager
    def _staged(self, expert_id: str, files: Mapping[str, bytes]) -> Generator[Path, None, None]:
        staging = self.folder / ".staging" / f"{expert_id}@{secrets.token_hex(4)}"
        try:
            with room_for(self.experts / expert_id, sum(map(len, files.values()))):
                staging.mkdir(parents=True)
                for name, data in files.items():
                    write_new(staging / name, data)
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _clear(self) -> None:
        """Remove what dead writers left. Only the holder of the lock may: nothing in there can be alive."""
        for left in [*_entries(self.folder / ".staging"), *_entries(self.folder / ".trash")]:
            expert_id, _, rest = left.name.partition("@")
            if rest.endswith(".old") and not (self.experts / expert_id).exists():
                os.rename(left, self.experts / expert_id)
            else:
                shutil.rmtree(left, ignore_errors=True)
        for part in self.folder.glob(f".{MANIFEST}.*.part"):
            part.unlink(missing_ok=True)

    def _check_empty(self) -> None:
        try:
            strangers = set(os.listdir(self.folder)) - _OURS
        except FileNotFoundError:
            return
        except OSError as error:
            raise refuse("CATALOG", self.where, f"it is no folder that can be read ({error.strerror}).") from None
        strangers = {name for name in strangers if not name.startswith(f".{MANIFEST}.")}
        if strangers:
            found = f"the folder holds {quote(min(strangers))} and no {MANIFEST}"
            raise refuse(
                "CATALOG", self.where, f"{found}: it is no catalogue. Name another folder and add adapters to it."
            )


def _is_id(name: str) -> bool:
    try:
        return check_id(name) != RESERVED
    except CatalogError:
        return False


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
