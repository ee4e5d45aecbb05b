"""Texts of the pretrained comparison: general text, and two corpora of another kind, cut into documents.

General is WikiText-2 (both files there are), an article a document: most of it to pretrain the pair on, a part that the
pair has not seen to align on, a part for testing. The two targets are Shakespeare, whose plays come without marks of
scenes, in runs of whole speeches of some 6,000 characters, and the standard library of the Python that runs this, a
file a document. Every document lies in one part only; which, goes by its number.
"""

import re
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

GENERAL, TARGETS = "general", ("shakespeare", "library")
LENGTH, BATCH = 64, 16
VOCABULARY = 1536
WINDOWS = 10
"""Of a document for testing, at most; so no file counts for more than a scene."""

_ARTICLE = re.compile(r"(?m)^(?= = [^=].* = \n)")
_SPEECHES, _SMALLEST, _LARGEST = 6_000, 4_000, 40_000
_PARTS: Mapping[str, Mapping[str, Sequence[int]]] = {  # of every twenty documents
    GENERAL: {"test": (4, 14), "align": (0, 9, 18)},
    "shakespeare": {"test": (2, 7, 12, 17), "search": (4, 9, 14, 19)},
    "library": {"test": (2, 7, 12, 17), "search": (4, 9, 14, 19)},
}


def documents(corpus: str, data: Path) -> list[str]:
    """The documents of a corpus, in their order."""
    if corpus == GENERAL:
        texts = [(data / "wikitext2" / name).read_text("utf-8") for name in ("valid.txt", "test.txt")]
        return [piece for text in texts for piece in _ARTICLE.split(text) if len(piece) > 200]
    if corpus == "shakespeare":
        return _runs((data / "tinyshakespeare" / "input.txt").read_text("utf-8").split("\n\n"))
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [file.read_text("utf-8", errors="replace") for file in files]
    return [text for text in texts if _SMALLEST <= len(text) <= _LARGEST]


def parts(corpus: str, given: Sequence[str]) -> dict[str, list[str]]:
    """Documents by part: `train`, `test`, and `align` or `search`."""
    places = {place: part for part, taken in _PARTS[corpus].items() for place in taken}
    found: dict[str, list[str]] = {"train": [], **{part: [] for part in _PARTS[corpus]}}
    for number, text in enumerate(given):
        found[places.get(number % 20, "train")].append(text)
    return found


def missing(data: Path) -> list[str]:
    """The files that are not there."""
    wanted = ("wikitext2/valid.txt", "wikitext2/test.txt", "tinyshakespeare/input.txt")
    return [name for name in wanted if not (data / name).is_file()]


@dataclass(frozen=True, slots=True)
class Part:
    """The token ids of some documents."""

    documents: list[Int[Tensor, " tokens"]]

    @property
    def stream(self) -> Int[Tensor, " tokens"]:
        """All of them, one after the other, each with its end token."""
        return torch.cat(self.documents)

    def windows(self, most: int = WINDOWS) -> list[Int[Tensor, "windows length"]]:
        """Of each document the first consecutive windows of `LENGTH` tokens and the one that follows."""
        found: list[Tensor] = []
        for ids in self.documents:
            count = min(most, (len(ids) - 1) // LENGTH)
            if count:
                found.append(torch.stack([ids[i * LENGTH : (i + 1) * LENGTH + 1] for i in range(count)]))
        return found


class Batches:
    """Windows at random places of a stream. Those of a step depend on the seed and the step only."""

    def __init__(self, stream: Tensor, seed: int, batch: int = BATCH) -> None:
        self.stream, self.seed, self.batch = stream, seed, batch

    def __call__(self, step: int) -> Int[Tensor, "batch length"]:
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        starts = torch.randint(0, len(self.stream) - LENGTH - 1, (self.batch,), generator=draw)
        return torch.stack([self.stream[start : start + LENGTH + 1] for start in starts.tolist()])


class Texts:
    """Every part of every corpus in the tokens of one tokenizer."""

    def __init__(self, data: Path, tokenizer: Any, corpora: Sequence[str] = (GENERAL, *TARGETS)) -> None:
        end = tokenizer.eos_token_id
        self.parts: dict[str, dict[str, Part]] = {}
        for corpus in corpora:
            split = parts(corpus, documents(corpus, data))
            self.parts[corpus] = {
                part: Part([torch.tensor([*tokenizer(text)["input_ids"], end]) for text in texts])
                for part, texts in split.items()
            }

    def sizes(self) -> dict[str, dict[str, list[int]]]:
        """Documents and tokens of every part."""
        return {
            corpus: {name: [len(part.documents), len(part.stream)] for name, part in found.items()}
            for corpus, found in self.parts.items()
        }


def _runs(speeches: Sequence[str]) -> list[str]:
    found: list[str] = []
    kept: list[str] = []
    for speech in speeches:
        kept.append(speech)
        if sum(map(len, kept)) >= _SPEECHES:
            found.append("\n\n".join(kept))
            kept = []
    return [*found, "\n\n".join(kept)] if kept else found
