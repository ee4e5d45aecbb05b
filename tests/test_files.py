import hashlib
import os
from pathlib import Path

import pytest

from mixwright.errors import CatalogError
from mixwright.files import exclusive_lock, publish_folder, read_regular, sha256_file, withdraw_folder, write_atomic


def test_digest_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"x" * 3_000_000).hexdigest()


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"four")
    assert read_regular(tmp_path / "a", 4) == b"four"
    with pytest.raises(CatalogError, match="^SIZE "):
        read_regular(tmp_path / "a", 3)
    (tmp_path / "link").symlink_to("a")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("link", "pipe", "folder"):
        with pytest.raises(CatalogError, match="^PATH "):
            read_regular(tmp_path / name, 9)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "nothing", 9)


def test_the_lock_is_one_holders(tmp_path: Path) -> None:
    with exclusive_lock(tmp_path / "lock"):
        with pytest.raises(CatalogError, match="^LOCKED "), exclusive_lock(tmp_path / "lock", timeout=0.05):
            raise AssertionError("two holders")
    with exclusive_lock(tmp_path / "lock", timeout=0.05):
        pass


def test_a_folder_is_published_once(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_atomic(tmp_path / name / "a", name.encode())
    publish_folder(tmp_path / "one", tmp_path / "final")
    with pytest.raises(OSError, match="not empty|exists"):
        publish_folder(tmp_path / "two", tmp_path / "final")
    assert (tmp_path / "final" / "a").read_bytes() == b"one" and (tmp_path / "two").is_dir()
    withdraw_folder(tmp_path / "final", tmp_path / "aside")
    assert not (tmp_path / "final").exists() and (tmp_path / "aside" / "a").exists()
