"""Bytes on a disk: read without being led astray, written whole or not at all.

Publishing is: write, fsync each file, fsync the folder, rename, fsync the parent. Each step is needed: in simulated
power cuts a missing last fsync lost acknowledged saves, and a rename without any fsync lost most of them.
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path

from mixwright.errors import CatalogError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)


def sha256_bytes(data: bytes) -> str:
    """The SHA-256 of bytes, as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_regular(name: str | os.PathLike[str], *, folder: int | None = None) -> int:
    """A descriptor for reading a regular file; links are not followed and a pipe does not block.

    `folder` is the descriptor of the folder that `name` is relative to. Raises CatalogError (PATH) for anything but a
    regular file, FileNotFoundError or NotADirectoryError for nothing.
    """
    where = f'file "{os.path.basename(name)}"'
    try:
        kind = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
        if not stat.S_ISREG(kind):
            raise CatalogError(
                "PATH", where, f"this is {_kind(kind)}; only regular files are read. Copy the file itself."
            )
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise CatalogError("PATH", where, f"it cannot be opened ({error.strerror}). Check its permissions.") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # swapped between the two looks
        os.close(descriptor)
        raise CatalogError("PATH", where, "this is not a regular file; only regular files are read.")
    return descriptor


def read_exactly(descriptor: int, count: int) -> bytes:
    """The next `count` bytes of a descriptor, or fewer where the file ends."""
    pieces: list[bytes] = []
    while count > 0:
        piece = os.read(descriptor, min(count, 1 << 26))
        if not piece:
            break
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def read_regular(name: str | os.PathLike[str], limit: int, *, folder: int | None = None) -> bytes:
    """The bytes of a regular file of at most `limit` bytes. Raises CatalogError (PATH, SIZE), FileNotFoundError."""
    descriptor = open_regular(name, folder=folder)
    try:
        size = os.fstat(descriptor).st_size
        data = read_exactly(descriptor, limit + 1) if size <= limit else b""
        if size > limit or len(data) > limit:
            raise CatalogError(
                "SIZE", f'file "{os.path.basename(name)}"', f"{size} bytes; at most {limit} are accepted."
            )
        return data
    finally:
        os.close(descriptor)


def write_new(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file that must not exist yet, without syncing: `publish_folder` will. Put it in `room_for` the whole."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        write_all(descriptor, data)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all bytes at a descriptor's place."""
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace a file's content at one instant: readers and power cuts see the old bytes or the new, never a part.

    Raises CatalogError (DISK_FULL), with the old content in place and nothing left beside it.
    """
    with staged_file(path, len(data)) as descriptor:
        write_all(descriptor, data)


@contextlib.contextmanager
def staged_file(path: str | os.PathLike[str], needed: int) -> Generator[int, None, None]:
    """A descriptor of a file that takes the name `path` at one instant when the block ends well, and else is gone.

    `needed`: the bytes it will hold, for the message. Raises CatalogError (DISK_FULL), with the old content in place.
    """
    path = Path(path)
    with room_for(path, needed):
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        try:
            try:
                os.fchmod(descriptor, 0o644)
                yield descriptor
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        _sync(path.parent)


def publish_folder(staging: Path, final: Path) -> None:
    """Make a written folder appear under its final name, whole, so that a power cut cannot take it back.

    `final` must not exist (or be empty); both must lie on one file system. On failure `staging` is left to the caller.
    """
    with room_for(final, 0):
        _sync_tree(staging)
        os.rename(staging, final)
        try:
            _sync(final.parent)
        except OSError:
            os.rename(final, staging)  # not certain to last, so not published
            raise


def replace_folder(staging: Path, final: Path) -> None:
    """As `publish_folder`, over a folder that exists: the two change places in one step, and `staging` is the old one.

    Where the system cannot exchange two names, the old folder is first moved aside to `<staging>.old`: a process that
    dies in between leaves it there, and whoever holds the lock next moves it back.
    """
    with room_for(final, 0):
        _sync_tree(staging)
        if not _exchange(staging, final):
            aside = staging.with_name(f"{staging.name}.old")
            os.rename(final, aside)
            os.rename(staging, final)
            os.rename(aside, staging)
        _sync(final.parent)
        _sync(staging.parent)


@contextlib.contextmanager
def staged_folder(final: Path, *, replace: bool = False) -> Generator[Path, None, None]:
    """A folder to write into, which takes the name `final` at one instant when the block ends well, and else is gone.

    `final` must be new or empty, unless it is to be replaced. Raises CatalogError (PATH) for one that is in use.
    """
    final = final.absolute()
    if not replace and final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise CatalogError("PATH", str(final), "this is in use; give a new or empty folder.")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}.", suffix=".part"))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        why = error.strerror or type(error).__name__
        raise CatalogError(
            "PATH", str(final), f"no folder can be made here ({why}); give a place that can be written to."
        ) from error
    try:
        staging.chmod(0o755)
        yield staging
        (replace_folder if replace else publish_folder)(staging, final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def withdraw_folder(folder: Path, aside: Path) -> None:
    """Take a folder out of sight at one instant by moving it to `aside`, so that a power cut cannot bring it back."""
    with room_for(folder, 0):
        os.rename(folder, aside)
        _sync(folder.parent)
        _sync(aside.parent)


@contextlib.contextmanager
def exclusive_lock(path: str | os.PathLike[str], timeout: float = 60.0) -> Generator[None, None, None]:
    """Hold the lock file at `path` while the block runs; the system lets go of it when the process ends, however.

    Raises CatalogError (LOCKED) when another writer keeps it for `timeout` seconds.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        _wait_for(descriptor, time.monotonic() + timeout, str(path))
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def room_for(path: str | os.PathLike[str], needed: int) -> Generator[None, None, None]:
    """Turn "no space left on device" inside the block into a DISK_FULL refusal that says what is needed and free."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise disk_full(path, needed) from None


def is_full(error: OSError) -> bool:
    """Whether an error of the system says that the disk, or the user's share of it, is full."""
    return error.errno in _FULL


def disk_full(path: str | os.PathLike[str], needed: int) -> CatalogError:
    """The refusal (DISK_FULL) of a write to `path` that needs so many bytes."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    message = f"{needed} bytes are needed and {free} are free. Nothing was changed; make room and do it again."
    return CatalogError("DISK_FULL", f'writing "{Path(path).name}"', message)


def _wait_for(descriptor: int, until: float, path: str) -> None:
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                message = (
                    "another process is writing and did not finish in time. Wait for it, or end it, and try again."
                )
                raise CatalogError("LOCKED", path[-80:], message) from None
            time.sleep(0.01)


def _sync(path: str | os.PathLike[str]) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(os.path.join(root, name))
        _sync(root)


def _exchange(one: Path, other: Path) -> bool:
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    here = -100  # AT_FDCWD
    if rename(here, os.fsencode(one), here, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS):  # a file system, or a kernel, that cannot
        return False
    raise OSError(code, os.strerror(code), str(other))


def _kind(mode: int) -> str:
    kinds = {stat.S_IFLNK: "a link", stat.S_IFIFO: "a named pipe", stat.S_IFDIR: "a folder", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")
