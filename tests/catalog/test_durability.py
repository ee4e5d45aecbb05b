"""What was acknowledged stays, what was refused leaves nothing: full disks, killed writers, flipped bits."""

import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import mixwright
from mixwright import files
from mixwright.catalog.store import Catalog
from mixwright.errors import CatalogError

SOURCE = str(Path(mixwright.__file__).parents[1])


class Recorder:
    """Stands in for `os` inside mixwright.files: notes what is asked of the disk, and can refuse the n-th request."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls: list[tuple[str, str]] = []
        self.fail_at = fail_at
        self.writes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _note(self, name: str, path: str) -> None:
        self.calls.append((name, path))
        if name in ("write", "fsync", "rename", "replace"):
            self.writes += 1
            if self.writes == self.fail_at:
                raise OSError(errno.ENOSPC, "No space left on device")

    def _path(self, descriptor: int) -> str:
        return os.readlink(f"/proc/self/fd/{descriptor}")

    def write(self, descriptor: int, data: Any) -> int:
        self._note("write", self._path(descriptor))
        return os.write(descriptor, data[:3000])  # a short write, which the system may always do

    def fsync(self, descriptor: int) -> None:
        self._note("fsync", self._path(descriptor))
        os.fsync(descriptor)

    def rename(self, source: Any, target: Any) -> None:
        self._note("rename", str(target))
        os.rename(source, target)

    def replace(self, source: Any, target: Any) -> None:
        self._note("replace", str(target))
        os.replace(source, target)


def test_publishing_syncs_files_folder_and_parent_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging, final = tmp_path / "staging" / "x", tmp_path / "experts" / "x"
    staging.mkdir(parents=True)
    final.parent.mkdir()
    recorder = Recorder()
    monkeypatch.setattr(files, "os", recorder)
    files.write_new(staging / "a", b"one")
    files.write_new(staging / "b", b"two")
    files.publish_folder(staging, final)
    seen = [(name, Path(path).name) for name, path in recorder.calls]
    synced = [("fsync", "a"), ("fsync", "b")]
    rest = [call for call in seen if call[0] != "write"]
    assert sorted(rest[:2]) == synced
    assert rest[2:] == [("fsync", "x"), ("rename", "x"), ("fsync", "experts")]
    assert max(at for at, call in enumerate(seen) if call[0] == "write") < seen.index(rest[0])


def test_replacing_a_file_syncs_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(files, "os", recorder)
    files.write_atomic(tmp_path / "a", b"content")
    steps = [name for name, _ in recorder.calls]
    assert [*dict.fromkeys(steps[:-1]), steps[-1]] == ["write", "fsync", "replace", "fsync"]
    assert recorder.calls[-1][1] == str(tmp_path) and (tmp_path / "a").read_bytes() == b"content"


def operations(source: Path) -> dict[str, Any]:
    return {
        "add": lambda catalog: catalog.add(source, expert_id="added"),
        "attach": lambda catalog: catalog.attach("there", quality={"gain": 1.0}),
        "disable": lambda catalog: catalog.disable("there"),
        "enable": lambda catalog: catalog.enable("away"),
        "remove": lambda catalog: catalog.remove("away"),
    }


@pytest.mark.parametrize("name", ["add", "attach", "disable", "enable", "remove"])
def test_a_full_disk_at_every_write_point(
    name: str, tmp_path: Path, specimen: Any, backbone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each write, sync and rename in turn fails once: the state is the old or the new one, and the next try works."""
    source = specimen().write(tmp_path / "x")
    prepared = Catalog(tmp_path / "prepared")
    for expert in ("there", "away"):
        prepared.add(source, expert_id=expert)
    prepared.disable("away")
    points = 0
    while True:
        points += 1
        folder = tmp_path / f"catalogue{points}"
        shutil.copytree(prepared.folder, folder)
        catalog = Catalog(folder)
        if name == "add":
            catalog = Catalog(folder, backbone)  # so that the manifest is written too
        before = (catalog.states(), [catalog.card(one).quality for one in ("there", "away")])
        recorder = Recorder(fail_at=points)
        monkeypatch.setattr(files, "os", recorder)
        try:
            operations(source)[name](catalog)
        except CatalogError as error:
            assert error.code == "DISK_FULL" and "bytes are needed" in error.message and "free" in error.message
        else:
            break
        finally:
            monkeypatch.setattr(files, "os", os)
        reread = Catalog(folder)
        assert reread.states() in (before[0], *after_states(name, before[0]))
        assert not [finding for finding in reread.check() if finding.level == "error"]
        assert not list((folder / ".staging").iterdir()) and not list(folder.rglob("*.part"))
        if name in reread.ids(active=False) or (name == "add" and "added" in reread.states()):
            reread.remove("added")
        if name != "remove" or "away" in reread.states():
            operations(source)[name](reread)
    assert points > 4


def after_states(name: str, states: dict[str, str]) -> list[dict[str, str]]:
    """A failure after the one rename that decides may find the change made; never anything else."""
    changed = {"disable": {"there": "disabled"}, "enable": {"away": "active"}}.get(name, {})
    without = {one: state for one, state in states.items() if one != "away"}
    return [states | changed, *([without] if name == "remove" else [])]


def test_a_real_limit_of_the_system(tmp_path: Path, specimen: Any) -> None:
    """The system itself refuses to write beyond 4 KB: refused by name, nothing left, and the process goes on."""
    source = specimen(rank=32).write(tmp_path / "x")
    catalog = Catalog(tmp_path / "catalogue")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(CatalogError) as refusal:
            catalog.add(source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refusal.value.code == "DISK_FULL"
    assert catalog.ids() == () and not any((catalog.folder / ".staging").iterdir())
    assert catalog.add(source).id == "x"


KILLER = f"""
import os, random, signal, sys, time
sys.path.insert(0, {SOURCE!r})
import torch
torch.set_num_threads(1)
from mixwright.catalog.store import Catalog
import mixwright.catalog.adapter, mixwright.catalog.check, mixwright.catalog.export
folder, source, logs, rounds = sys.argv[1:]

def write(name):
    catalog = Catalog(folder)
    log = os.open(os.path.join(logs, name), os.O_WRONLY | os.O_CREAT)
    for turn in range(10**6):
        expert = f"{{name}}-{{turn}}"
        steps = {{"added": lambda: catalog.add(source, expert_id=expert)}}
        steps["attached"] = lambda: catalog.attach(expert, quality={{"turn": turn}})
        if turn % 3:
            last = catalog.disable if turn % 3 == 1 else catalog.remove
            steps["disabled" if turn % 3 == 1 else "removed"] = lambda: last(expert)
        for verb, step in steps.items():
            step()
            os.write(log, (verb + " " + expert + chr(10)).encode())

chance = random.Random(5)
for round_ in range(int(rounds)):
    writers = []
    for at in range(3):
        child = os.fork()
        if child == 0:
            write(f"w{{round_}}-{{at}}")
        writers.append(child)
    while not all(os.path.exists(f"{{logs}}/w{{round_}}-{{at}}") for at in range(3)):
        time.sleep(0.005)
    for child in writers:
        time.sleep(chance.random() * 0.2)
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
"""


def test_killed_writers_lose_nothing_they_acknowledged(tmp_path: Path, specimen: Any) -> None:
    """Three writers at a time, 36 kill -9 at random moments: what was acknowledged is there, what is there is whole."""
    source = specimen(rank=1, targets=("q_proj",)).write(tmp_path / "x")
    folder, logs = tmp_path / "catalogue", tmp_path / "logs"
    logs.mkdir()
    script = tmp_path / "killer.py"
    script.write_text(KILLER)
    command = [sys.executable, str(script), str(folder), str(source), str(logs), "12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    catalog = Catalog(folder)
    assert sum(len(log.read_text().splitlines()) for log in logs.iterdir()) > 20
    check_against(list(logs.iterdir()), catalog)
    assert not [finding for finding in catalog.check() if finding.level == "error"]
    catalog.add(source, expert_id="last")  # the lock is free, and the remains are cleared
    assert not list(folder.glob(".staging/*")) and not list(folder.glob(".trash/*"))


def check_against(logs: list[Path], catalog: Catalog) -> None:
    states = catalog.states()
    for log in logs:
        acknowledged: dict[str, str] = {}
        for line in log.read_text().splitlines():
            verb, _, expert = line.partition(" ")
            acknowledged[expert] = verb
        for at, (expert, verb) in enumerate(acknowledged.items()):
            last = at == len(acknowledged) - 1  # the one that it was busy with may already have gone further
            if verb == "removed":
                assert expert not in states
            elif not (last and expert not in states and int(expert.rsplit("-", 1)[1]) % 3 == 2):
                assert expert in states
                assert verb == "added" or catalog.card(expert).quality
                assert verb != "disabled" or states[expert] == "disabled"


def test_writers_in_threads_lose_nothing(tmp_path: Path, specimen: Any) -> None:
    source = specimen(rank=1, targets=("q_proj",)).write(tmp_path / "x")
    failures: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for turn in range(5):
                Catalog(tmp_path / "catalogue").add(source, expert_id=f"{name}-{turn}")
                Catalog(tmp_path / "catalogue").disable(f"{name}-{turn}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    states = Catalog(tmp_path / "catalogue").states()
    assert len(states) == 15 and set(states.values()) == {"disabled"}


def test_readers_never_see_half_a_change(tmp_path: Path, specimen: Any) -> None:
    """One writer exchanges an expert's folder over and over; every read is whole, of one version."""
    catalog = Catalog(tmp_path / "catalogue")
    catalog.add(specimen(rank=1, targets=("q_proj",)).write(tmp_path / "x"))
    gates = {path: torch.zeros(8) for path in catalog.card("x").sites}
    stop = threading.Event()

    def write() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            catalog.attach("x", gates={path: gate + turn for path, gate in gates.items()}, quality={"turn": turn})

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen, reads = set[int](), 0
        while reads < 60 or len(seen) < 4:  # however slow the writer is
            assert writer.is_alive()
            reads += 1
            expert = Catalog(tmp_path / "catalogue").expert("x")
            if expert.gates is not None:
                turn = expert.card.quality["turn"]
                assert all((gate == turn).all() for gate in expert.gates.values())
                seen.add(turn)
    finally:
        stop.set()
        writer.join()


def test_a_folder_that_was_moved_aside_comes_back(
    tmp_path: Path, specimen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where two names cannot be exchanged, a writer that dies in between leaves the old folder for the next one."""
    catalog = Catalog(tmp_path / "catalogue")
    catalog.add(specimen().write(tmp_path / "x"))
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    catalog.attach("x", quality={"gain": 1.0})
    assert catalog.card("x").quality == {"gain": 1.0}
    os.rename(catalog.folder / "experts" / "x", catalog.folder / ".staging" / "x@0123.old")
    catalog.add(tmp_path / "x", expert_id="y")
    assert catalog.card("x").quality == {"gain": 1.0} and catalog.ids() == ("x", "y")


def test_every_flipped_bit_is_seen(tmp_path: Path, specimen: Any) -> None:
    catalog = Catalog(tmp_path / "catalogue")
    catalog.add(specimen(rank=1, targets=("q_proj",)).write(tmp_path / "x"))
    catalog.attach("x", gates={path: torch.randn(8) for path in catalog.card("x").sites}, licence="mit")
    catalog.disable("x")
    stored = [path for path in catalog.folder.rglob("*") if path.is_file() and path.name != ".lock"]
    assert len(stored) == 5
    chance = random.Random(0)
    for path in stored:
        good = path.read_bytes()
        for _ in range(60):
            bad = bytearray(good)
            bad[chance.randrange(len(bad))] ^= 1 << chance.randrange(8)
            path.write_bytes(bad)
            with pytest.raises(CatalogError):
                Catalog(catalog.folder).expert("x")
        for length in {chance.randrange(len(good)) for _ in range(20)}:
            path.write_bytes(good[:length])
            with pytest.raises(CatalogError):
                Catalog(catalog.folder).expert("x")
        path.write_bytes(good)
    assert Catalog(catalog.folder).expert("x").id == "x"


def test_every_deleted_file_is_seen(tmp_path: Path, specimen: Any) -> None:
    catalog = Catalog(tmp_path / "catalogue")
    catalog.add(specimen().write(tmp_path / "x"))
    for path in [path for path in catalog.folder.rglob("*") if path.is_file() and path.name != ".lock"]:
        good = path.read_bytes()
        path.unlink()
        if path.name != "catalog.json":
            with pytest.raises(CatalogError):
                catalog.expert("x")
            assert [one.level for one in catalog.check("x")] == ["error"]
        path.write_bytes(good)
    assert catalog.expert("x").id == "x"


def test_a_read_only_catalogue_refuses_and_can_be_read(tmp_path: Path, specimen: Any) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    catalog = Catalog(tmp_path / "catalogue")
    catalog.add(specimen().write(tmp_path / "x"))
    for path in (catalog.folder, catalog.folder / "experts"):
        path.chmod(0o555)
    try:
        with pytest.raises(CatalogError, match="READ_ONLY"):
            catalog.disable("x")
        assert Catalog(catalog.folder).expert("x").id == "x"
    finally:
        for path in (catalog.folder, catalog.folder / "experts"):
            path.chmod(0o755)


def test_the_naive_writer_fails_where_ours_does_not(tmp_path: Path) -> None:
    """The broken twin of atomic writing: the same full disk destroys what was there."""
    target = tmp_path / "state.json"
    target.write_text(json.dumps({"old": True}))

    def naive(path: Path, data: bytes) -> None:
        with open(path, "wb") as file:
            file.write(data[:4])
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        naive(target, b'{"new": true}')
    with pytest.raises(ValueError, match="Expecting|Unterminated"):
        json.loads(target.read_text())
