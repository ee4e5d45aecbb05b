"""An adapter's folder, opened once: every file is read relative to that one descriptor.

A folder that is renamed or exchanged in the middle of a read stays the same folder to its reader.
"""

import contextlib
import os
import re
from collections.abc import Generator
from pathlib import Path

from mixwright.catalog.refusal import refuse
from mixwright.errors import CatalogError
from mixwright.files import open_regular, read_exactly

_HUB_REPOSITORY = re.compile(r"(models|datasets)--[A-Za-z0-9._\-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Folder:
    """A folder open for reading; `where` is how messages name it."""

    def __init__(self, descriptor: int, path: Path, where: str) -> None:
        self._descriptor = descriptor
        self._path = path
        self.where = where

    def names(self) -> set[str]:
        """What lies in the folder."""
        return set(os.listdir(self._descriptor))

    @contextlib.contextmanager
    def open(self, name: str) -> Generator[int, None, None]:
        """A descriptor of the regular file `name`. Raises CatalogError (PATH), FileNotFoundError."""
        descriptor = self._open(name)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def read(self, name: str, limit: int) -> bytes:
        """The bytes of the file `name`. Raises CatalogError (PATH, SIZE), FileNotFoundError."""
        with self.open(name) as descriptor:
            size = os.fstat(descriptor).st_size
            data = read_exactly(descriptor, limit + 1) if size <= limit else b""
        if size > limit or len(data) > limit:
            raise refuse("SIZE", self.where, f"{name} has {size} bytes; at most {limit} are accepted.")
        return data

    def _open(self, name: str) -> int:
        try:
            return open_regular(name, folder=self._descriptor)
        except CatalogError as error:
            blob = self._hub_blob(name)
            if blob is not None:
                return open_regular(blob)
            raise refuse("PATH", self.where, f"{name}: {error.message}") from None

    def _hub_blob(self, name: str) -> Path | None:
        """Where a link of the hub's cache leads, if it leads into the same repository's blobs and nowhere else."""
        snapshots, repository = self._path.parent, self._path.parent.parent
        is_cache = _COMMIT.fullmatch(self._path.name) and snapshots.name == "snapshots"
        if not (is_cache and _HUB_REPOSITORY.fullmatch(repository.name) and (self._path / name).is_symlink()):
            return None
        blobs = repository / "blobs"
        target = Path(os.path.normpath(self._path / os.readlink(self._path / name)))
        return target if target.parent == blobs and not blobs.is_symlink() else None


@contextlib.contextmanager
def open_folder(path: Path, where: str) -> Generator[Folder, None, None]:
    """Open a folder that is no link. Raises CatalogError (PATH)."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        found = "a link" if path.is_symlink() else (error.strerror or "it cannot be opened").lower()
        message = f"an adapter is a folder with adapter_config.json and adapter_model.safetensors; found: {found}."
        raise refuse("PATH", where, message) from None
    try:
        yield Folder(descriptor, Path(os.path.abspath(path)), where)
    finally:
        os.close(descriptor)
