"""Text that lies on every machine with Python: the demo's corpus, found, split and never downloaded.

A domain that has too little text here is left out by name; nothing else depends on which domains are found.
"""

import hashlib
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ENOUGH = 150_000
_MOST = 1_200_000
_LARGEST_FILE = 800_000
_PIECE = 4_000
_HELD_OUT_EVERY = 7


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the text of a domain lies: glob patterns below the places where Python keeps its packages."""

    name: str
    what: str
    patterns: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Domain:
    """A domain's text, in pieces of about 4,000 characters; no paragraph of `held_out` stands in `train`."""

    name: str
    what: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]

    @property
    def characters(self) -> int:
        """Length of both parts."""
        return sum(map(len, self.train)) + sum(map(len, self.held_out))


BASE = Source(name="python", what="the standard library's code and its help topics", patterns=("*.py", "*/topics.py"))
SOURCES = (
    Source(name="cpp", what="C and C++ headers", patterns=("**/*.h", "**/*.hpp", "**/*.cuh")),
    Source(
        name="licence",
        what="licences of the installed packages",
        patterns=("*.dist-info/LICEN*", "*.dist-info/COPYING*", "*.dist-info/licenses/**/*", "*/LICENSE*"),
    ),
    Source(name="readme", what="package descriptions", patterns=("*.dist-info/METADATA", "**/README*")),
    Source(name="yaml", what="YAML tables", patterns=("**/*.yaml", "**/*.yml")),
    Source(name="json", what="JSON tables", patterns=("**/*.json",)),
    Source(name="cmake", what="CMake modules", patterns=("**/*.cmake",)),
    Source(name="javascript", what="JavaScript", patterns=("**/*.js",)),
    Source(name="fortran", what="Fortran", patterns=("**/*.f90", "**/*.f")),
)


def find(source: Source, roots: Iterable[Path] | None = None, seed: int = 0) -> Domain:
    """The text of one source below `roots` (where packages lie; for the base, the standard library)."""
    places = tuple(roots) if roots is not None else _places(source)
    pieces = list(_pieces(source, places, seed))
    held = [piece for number, piece in enumerate(pieces) if number % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1]
    train = [piece for number, piece in enumerate(pieces) if number % _HELD_OUT_EVERY != _HELD_OUT_EVERY - 1]
    return Domain(name=source.name, what=source.what, train=tuple(train), held_out=tuple(_unseen(held, train)))


def find_all(most: int = 6, roots: Iterable[Path] | None = None) -> tuple[tuple[Domain, ...], tuple[Domain, ...]]:
    """The first `most` domains with enough text, and those left out for having too little."""
    places = None if roots is None else tuple(roots)
    found: list[Domain] = []
    short: list[Domain] = []
    for source in SOURCES:
        if len(found) < most:
            domain = find(source, places)
            (found if domain.characters >= ENOUGH and len(domain.held_out) >= 4 else short).append(domain)
    return tuple(found), tuple(short)


def digest(domains: Iterable[Domain]) -> str:
    """A short hash of all text used, since figures depend on what is installed."""
    sha = hashlib.sha256()
    for domain in domains:
        for piece in (*domain.train, *domain.held_out):
            sha.update(piece.encode())
    return sha.hexdigest()[:12]


def _places(source: Source) -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    if source is BASE:
        return tuple(
            Path(paths["stdlib"]) / part for part in ("", "asyncio", "email", "json", "pydoc_data", "unittest")
        )
    return tuple(dict.fromkeys(Path(paths[key]) for key in ("purelib", "platlib")))


def _pieces(source: Source, roots: Iterable[Path], seed: int) -> Iterator[str]:
    """Pieces of text in a seeded order of files, each paragraph once, until there is enough."""
    files = sorted({path for root in roots for pattern in source.patterns for path in _glob(root, pattern)})
    random.Random(seed).shuffle(files)
    seen: set[str] = set()
    total, piece = 0, ""
    budget = _MOST // 6
    for file in files:
        taken = 0
        for paragraph in _paragraphs(_read(file)):
            key = " ".join(paragraph.split())
            if key in seen or taken > budget:
                continue
            seen.add(key)
            piece += paragraph + "\n"
            taken += len(paragraph)
            if len(piece) >= _PIECE:
                yield piece
                total, piece = total + len(piece), ""
        if total >= _MOST:
            return


def _paragraphs(text: str) -> Iterator[str]:
    """Parts between empty lines; a part longer than a piece is cut."""
    for paragraph in re.split(r"(?<=\n)\n", text):
        for start in range(0, len(paragraph), _PIECE):
            yield paragraph[start : start + _PIECE]


def _glob(root: Path, pattern: str) -> Iterator[Path]:
    try:
        yield from (path for path in root.glob(pattern) if path.is_file())
    except OSError:
        return


def _read(file: Path) -> str:
    try:
        if file.stat().st_size > _LARGEST_FILE:
            return ""
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _unseen(held: Iterable[str], train: Iterable[str]) -> Iterator[str]:
    """Held-out pieces that share no long line with the training text beyond a tenth of their own length."""
    known = {line.strip() for piece in train for line in piece.splitlines() if len(line) > 60}
    for piece in held:
        shared = sum(len(line) for line in piece.splitlines() if line.strip() in known)
        if shared <= len(piece) // 10:
            yield piece
