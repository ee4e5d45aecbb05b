"""Hub ids, through a client that answers as it is told: pinned to a commit, and never followed out of its cache."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mixwright.catalog.store import Catalog
from mixwright.errors import CatalogError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """One repository in a cache laid out as huggingface_hub's: snapshots full of links into blobs."""

    def __init__(self, root: Path, adapter: Path, commit: str = COMMIT) -> None:
        self.cache = root / "models--someone--law-lora"
        self.snapshot = self.cache / "snapshots" / commit
        self.snapshot.mkdir(parents=True)
        (self.cache / "blobs").mkdir()
        self.sha: Any = commit
        self.sizes: dict[str, int] = {}
        self.revisions: list[str | None] = []
        for at, path in enumerate(sorted(adapter.iterdir())):
            shutil.copy(path, self.cache / "blobs" / f"blob{at}")
            (self.snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / f"blob{at}")
            self.sizes[path.name] = path.stat().st_size

    def repo_info(self, repo_id: str, *, revision: str | None = None, files_metadata: bool = False) -> Any:
        self.revisions.append(revision)
        siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in self.sizes.items()]
        return SimpleNamespace(sha=self.sha, siblings=siblings)

    def hf_hub_download(self, repo_id: str, filename: str, *, revision: str | None = None) -> str:
        self.revisions.append(revision)
        return str(self.snapshot / filename)


@pytest.fixture
def hub(tmp_path: Path, specimen: Any) -> Hub:
    return Hub(tmp_path / "cache", specimen().write(tmp_path / "adapter"))


def test_a_branch_is_resolved_once_and_recorded(hub: Hub, catalog: Catalog) -> None:
    card = catalog.add("someone/law-lora", revision="main", hub=hub)
    assert card.id == "law-lora" and (card.source.kind, card.source.revision) == ("hub", COMMIT)
    assert hub.revisions == ["main", COMMIT, COMMIT]
    assert catalog.expert("law-lora").card.source.name == "someone/law-lora"
    assert not (catalog.folder / "experts" / "law-lora" / "adapter_config.json").is_symlink()


def test_a_snapshot_folder_can_be_added_by_path(hub: Hub, catalog: Catalog) -> None:
    assert catalog.add(hub.snapshot, expert_id="x").source.kind == "folder"


def refusal(hub: Hub, catalog: Catalog, **settings: Any) -> str:
    with pytest.raises(CatalogError) as error:
        catalog.add("someone/law-lora", hub=hub, **settings)
    assert catalog.ids() == () and len(str(error.value)) <= 400
    return error.value.code


@pytest.mark.parametrize("sha", [None, "main", "abc", COMMIT[:-1], COMMIT.upper(), 7])
def test_no_commit(sha: Any, hub: Hub, catalog: Catalog) -> None:
    hub.sha = sha
    assert refusal(hub, catalog) == "HUB"


def test_another_commit_than_asked(hub: Hub, catalog: Catalog) -> None:
    assert refusal(hub, catalog, revision="f" * 40) == "HUB"


def test_sizes_are_looked_at_before_fetching(hub: Hub, catalog: Catalog) -> None:
    hub.sizes["adapter_config.json"] = 10**9
    assert refusal(hub, catalog) == "SIZE" and hub.revisions == [None]


def test_only_bin(hub: Hub, catalog: Catalog) -> None:
    hub.sizes = {"adapter_config.json": 9, "adapter_model.bin": 9}
    assert refusal(hub, catalog) == "FORMAT"


def test_a_client_that_fails(hub: Hub, catalog: Catalog) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("\x1b[31mno route" + "x" * 1000)

    hub.repo_info = fail  # type: ignore[method-assign]
    assert refusal(hub, catalog) == "HUB"


@pytest.mark.parametrize("where", ["outside", "other_blobs", "snapshot", "absolute", "link_to_link"])
def test_links_that_lead_out_of_the_repository(where: str, hub: Hub, catalog: Catalog, tmp_path: Path) -> None:
    link = hub.snapshot / "adapter_model.safetensors"
    blob = link.resolve()
    link.unlink()
    elsewhere = tmp_path / "cache" / "models--someone--else" / "blobs"
    elsewhere.mkdir(parents=True)
    targets = {
        "outside": tmp_path / "adapter" / "adapter_model.safetensors",
        "absolute": tmp_path / "adapter" / "adapter_model.safetensors",
        "other_blobs": elsewhere / "blob",
        "snapshot": hub.snapshot / "other",
        "link_to_link": hub.cache / "blobs" / "second",
    }
    if not targets[where].exists():
        shutil.copy(blob, targets[where]) if where != "link_to_link" else targets[where].symlink_to(blob)
    link.symlink_to(targets[where])
    assert refusal(hub, catalog) == "PATH"


def test_links_outside_the_hubs_layout(hub: Hub, catalog: Catalog, tmp_path: Path) -> None:
    moved = tmp_path / "cache" / "other" / "snapshots" / COMMIT
    moved.parent.mkdir(parents=True)
    shutil.copytree(hub.cache / "blobs", tmp_path / "cache" / "other" / "blobs")
    shutil.copytree(hub.snapshot, moved, symlinks=True)
    with pytest.raises(CatalogError, match="^PATH "):
        catalog.add(moved, expert_id="x")


def test_what_is_no_hub_id_is_a_path(catalog: Catalog, hub: Hub) -> None:
    for source in ("a/b/c", "../a", "nothing", "a/..", "https://a/b"):
        with pytest.raises(CatalogError, match="^(PATH|NAME) "):
            catalog.add(source, hub=hub)
    assert hub.revisions == []


def test_a_revision_of_a_folder(catalog: Catalog, tmp_path: Path, specimen: Any) -> None:
    with pytest.raises(CatalogError, match="^HUB "):
        catalog.add(specimen().write(tmp_path / "x"), revision="main")
