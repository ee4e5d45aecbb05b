"""Adapters on the hub: a name is resolved once to a commit, and only that commit's files are fetched and recorded."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from mixwright.catalog.bundle import MAX_WEIGHTS
from mixwright.catalog.card import CARD, CONFIG, GATES, MAX_CARD, SIGNATURES, WEIGHTS, Source
from mixwright.catalog.peft_config import MAX_CONFIG
from mixwright.catalog.refusal import quote, refuse, show
from mixwright.errors import CatalogError

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-]{0,95}/[A-Za-z0-9][A-Za-z0-9._\-]{0,95}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LIMITS = {CONFIG: MAX_CONFIG, WEIGHTS: MAX_WEIGHTS, GATES: MAX_WEIGHTS, SIGNATURES: MAX_WEIGHTS, CARD: MAX_CARD}


class HubClient(Protocol):
    """The two calls of huggingface_hub.HfApi that are used."""

    def repo_info(self, repo_id: str, *, revision: str | None = None, files_metadata: bool = False) -> Any:
        """The repository at a revision: `.sha`, and `.siblings` with `.rfilename` and `.size`."""
        ...

    def hf_hub_download(self, repo_id: str, filename: str, *, revision: str | None = None) -> str:
        """The path of one file in the local cache."""
        ...


def is_hub_id(source: str) -> bool:
    """Whether a text has the form of a hub id, `owner/name`."""
    return _ID.fullmatch(source) is not None and ".." not in source


def fetch(repo_id: str, revision: str | None = None, client: HubClient | None = None) -> tuple[Path, str]:
    """The folder of an adapter in the hub's cache, and the 40-digit commit that it is.

    Raises CatalogError: HUB where the repository cannot be read or does not resolve to a commit, SIZE from the listing
    alone. What was fetched is not trusted: it goes through the same checks as any folder.
    """
    where = f"hub repository {quote(repo_id)}"
    hub = client or _default_client()
    try:
        info = hub.repo_info(repo_id, revision=revision, files_metadata=True)
        commit = info.sha
        if not (isinstance(commit, str) and _COMMIT.fullmatch(commit)):
            raise refuse(
                "HUB", where, f"it resolved to {quote(str(commit))}, which is no commit. Give a 40-digit commit."
            )
        if revision is not None and _COMMIT.fullmatch(revision) and revision != commit:
            raise refuse(
                "HUB", where, f"commit {revision} was asked for and {commit} was answered. Check the repository."
            )
        wanted = _wanted(info.siblings or (), where)
        paths = [Path(hub.hf_hub_download(repo_id, name, revision=commit)) for name in wanted]
    except CatalogError:
        raise
    except Exception as error:  # the client and its transport have no common class of errors
        raise refuse(
            "HUB", where, f"it could not be fetched ({show(str(error))}). Check its name and your access."
        ) from None
    folders = {path.parent for path in paths}
    if len(folders) != 1:
        raise refuse(
            "HUB", where, "its files lie in several folders of the cache. Delete the cache entry and try again."
        )
    return folders.pop(), commit


def locate(
    source: str | os.PathLike[str], revision: str | None, client: HubClient | None = None
) -> tuple[Path, Source]:
    """The folder to read, and where it is from. A text that names no folder and looks like a hub id is one."""
    path = Path(source).expanduser()
    if not os.path.lexists(path) and isinstance(source, str) and is_hub_id(source):
        path, commit = fetch(source, revision, client)
        return path, Source(kind="hub", name=source, revision=commit)
    if revision is not None:
        raise refuse(
            "HUB", f"adapter {quote(str(source))}", "a revision is for hub ids; this is a folder. Leave it out."
        )
    return path, Source(kind="folder", name=os.path.basename(os.path.abspath(path)))


def _wanted(siblings: Sequence[Any], where: str) -> list[str]:
    sizes = {str(item.rfilename): item.size for item in siblings}
    for name, limit in _LIMITS.items():
        size = sizes.get(name)
        if isinstance(size, int) and size > limit:
            raise refuse("SIZE", where, f"{name} has {size} bytes; at most {limit} are accepted.")
    wanted = [name for name in _LIMITS if name in sizes]
    if CONFIG not in wanted or WEIGHTS not in wanted:
        others = ", ".join(quote(name, 40) for name in sorted(sizes)[:4])
        message = (
            f"it has no {CONFIG} with {WEIGHTS} (it has {others}). Only adapters stored as safetensors are accepted."
        )
        raise refuse("FORMAT", where, message)
    return wanted


def _default_client() -> HubClient:
    from huggingface_hub import HfApi

    return cast(HubClient, HfApi())
