"""Domains from a tree of folders, or a zip archive of one: a folder that holds items is a class, named by its path.

`birds/owl/1.png` is an item of the class `birds/owl`, which is of the group `birds`. A single folder that holds all the
others is left out of the names. Files beside the class folders are passed over (`README.txt`, tables), and so are files
in a class that are neither images nor .txt.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from mixwright.data.domains import Domain
from mixwright.data.encoded import IMAGES, TEXTS, Encoded, Leaf, files_under, members_of

Steps = tuple[str, ...]


def folder_domain(name: str, root: Path) -> Domain:
    """The domain of a folder of class folders.

    Raises ValueError, naming the file or folder: no class, one that is empty or has nothing to read, images beside
    texts, a text that cannot be read, a link that leads in a circle.
    """
    return _domain(name, list(files_under(root)), str(root))


def archive_domain(name: str, archive: Path) -> Domain:
    """The domain of a zip archive of class folders. Raises ValueError as `folder_domain`, and for a damaged archive."""
    return _domain(name, list(members_of(archive)), str(archive))


def _domain(name: str, leaves: list[Leaf], where: str) -> Domain:
    while len({steps[:1] for steps, _ in leaves}) == 1 and any(len(steps) > 2 for steps, _ in leaves):
        leaves = [(steps[1:], item) for steps, item in leaves]
    classes = _classes(leaves, where)
    if not classes:
        raise ValueError(
            f"{where}: no class folders; expected a folder for each class, with its images or .txt files inside."
        )
    _refuse_nested(classes, where)
    items = [item for members in classes.values() for item in members]
    texts, images = ([item for item in items if _suffix(item) in kind] for kind in (TEXTS, IMAGES))
    if texts and images:
        raise ValueError(f"{where}: texts ({texts[0].where}) and images ({images[0].where}); a domain is of one kind.")
    nested = any(len(path) > 1 for path in classes)
    return Domain(
        name,
        [item.text() for item in texts] or images,
        [label for label, members in enumerate(classes.values()) for _ in members],
        tuple("/".join(path) for path in classes),
        tuple("/".join(path[:-1]) for path in classes) if nested else (),
    )


def _classes(leaves: Iterable[Leaf], where: str) -> dict[Steps, list[Encoded]]:
    """The items of each folder that has any that can be read."""
    files: dict[Steps, list[Encoded]] = {}
    for steps, item in leaves:
        if item is None and steps:
            raise ValueError(f"{where}: class {'/'.join(steps)!r} is empty; put its items in, or take the folder out.")
        if item is not None and len(steps) > 1:
            files.setdefault(steps[:-1], []).append(item)
    classes = {path: [item for item in members if _suffix(item) in IMAGES | TEXTS] for path, members in files.items()}
    for path, members in classes.items():
        holds = any(len(other) > len(path) and other[: len(path)] == path for other in classes)
        if not members and not holds:
            strange = PurePosixPath(files[path][0].where).name
            raise ValueError(
                f"{where}: class {'/'.join(path)!r} has no item that can be read ({strange}); expected images "
                f"({', '.join(sorted(IMAGES))}) or .txt files."
            )
    return {path: members for path, members in classes.items() if members}


def _refuse_nested(classes: Mapping[Steps, list[Encoded]], where: str) -> None:
    """An item is of one class, so no class lies within another."""
    for path in classes:
        outer = next((path[:depth] for depth in range(1, len(path)) if path[:depth] in classes), None)
        if outer is not None:
            raise ValueError(
                f"{where}: {'/'.join(outer)!r} holds items ({classes[outer][0].where}) and the class folder "
                f"{path[len(outer)]!r}; move the items into a class folder of their own."
            )


def _suffix(item: Encoded) -> str:
    return PurePosixPath(item.where).suffix.lower()
