"""Items as they lie on disk: files, members of an archive, cells of a table. Nothing is decoded here."""

import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path
from zipfile import BadZipFile, ZipFile, ZipInfo

from mixwright.errors import CatalogError
from mixwright.files import read_regular

IMAGES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"})
TEXTS = frozenset({".txt"})
DAMAGED = (BadZipFile, OSError, NotImplementedError, RuntimeError, EOFError, zlib.error, LZMAError, struct.error)
"""What reading a damaged archive, or one in a dialect of its own, raises."""
_LARGEST = 128 << 20
_LARGEST_TEXT = 1 << 20
_LARGEST_ARCHIVE = 2 << 30
_DEEPEST = 32
_IGNORED = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini"})


@dataclass(frozen=True, slots=True)
class Encoded:
    """The bytes of an item, here (`data`) or in a file (`path`); `where` names it in messages."""

    where: str
    path: Path | None = None
    data: bytes | None = None

    def read(self) -> bytes:
        """All its bytes. Raises ValueError for what is no readable regular file, or is far too large for an item."""
        if self.data is not None:
            return self.data
        assert self.path is not None
        try:
            return read_regular(self.path.resolve(strict=True), _LARGEST)
        except CatalogError as error:
            raise ValueError(f"{self.where}: {error.message}") from error
        except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError on some systems
            raise ValueError(f"{self.where}: cannot be read ({error}); repair it or take it out.") from error

    def text(self) -> str:
        """Its bytes as a text. Raises ValueError for an empty one, one that is no UTF-8, or of more than a mebibyte."""
        data = self.read()
        if len(data) > _LARGEST_TEXT:
            raise ValueError(f"{self.where}: {len(data)} bytes; a text of an episode has at most {_LARGEST_TEXT}.")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.where}: not UTF-8 text ({error.reason} at byte {error.start}).") from None
        if not text.strip():
            raise ValueError(f"{self.where}: an empty text; fill it or take it out.")
        return text


Leaf = tuple[tuple[str, ...], Encoded | None]
"""Where a file lies below the root, by the names on the way to it; with None, a folder that holds nothing."""


def files_under(root: Path) -> Iterator[Leaf]:
    """Every file below a folder, sorted; what begins with a dot is passed over, links to folders are followed once.

    Raises ValueError for a link that leads round in a circle or to nothing, and for folders nested beyond reason.
    """
    yield from _walk(root, (), {})


def members_of(archive: Path) -> Iterator[Leaf]:
    """Every file in a zip archive, sorted, with its bytes. Raises ValueError for one that is damaged or a bomb."""
    try:
        with ZipFile(archive) as opened:
            members = sorted((info for info in opened.infolist() if not info.is_dir()), key=lambda info: info.filename)
            total = sum(info.file_size for info in members)
            if total > _LARGEST_ARCHIVE:
                raise ValueError(
                    f"{archive}: {total} bytes when unpacked; at most {_LARGEST_ARCHIVE} are held in memory. Unpack it."
                )
            for info in members:
                steps = tuple(part for part in info.filename.split("/") if part not in ("", ".", ".."))
                if not any(_is_ignored(step) for step in steps):
                    yield steps, Encoded(f"{archive}/{info.filename}", data=_member(opened, info, archive))
    except DAMAGED as error:
        raise ValueError(f"{archive}: not a readable zip archive ({error}).") from error


def _member(opened: ZipFile, info: ZipInfo, archive: Path) -> bytes:
    if info.file_size > _LARGEST:
        raise ValueError(f"{archive}/{info.filename}: {info.file_size} bytes; an item has at most {_LARGEST}.")
    with opened.open(info) as file:
        data = file.read(info.file_size + 1)
    if len(data) != info.file_size:
        raise ValueError(f"{archive}/{info.filename}: more bytes than the archive says; it is damaged or hostile.")
    return data


def _walk(folder: Path, steps: tuple[str, ...], above: dict[tuple[int, int], Path]) -> Iterator[Leaf]:
    """`above`: the folders on the way here, which none below may be again."""
    try:
        status = folder.stat()
        entries = sorted(entry for entry in folder.iterdir() if not _is_ignored(entry.name))
    except OSError as error:
        raise ValueError(f"{folder}: cannot be read ({error}).") from error
    key = (status.st_dev, status.st_ino)
    if key in above:
        raise ValueError(f"{folder}: a link that leads back to {above[key]}; take it out.")
    if len(steps) > _DEEPEST:
        raise ValueError(f"{folder}: {len(steps)} folders deep; at most {_DEEPEST}.")
    if not entries:
        yield steps, None
    for entry in entries:
        try:
            mode = entry.stat().st_mode
        except OSError as error:
            raise ValueError(f"{entry}: cannot be read ({error}); repair it or take it out.") from error
        if stat.S_ISDIR(mode):
            yield from _walk(entry, (*steps, entry.name), {**above, key: folder})
        elif stat.S_ISREG(mode):
            yield (*steps, entry.name), Encoded(str(entry), entry)
        else:
            raise ValueError(f"{entry}: neither a file nor a folder; take it out.")


def _is_ignored(name: str) -> bool:
    return name.startswith(".") or name in _IGNORED
