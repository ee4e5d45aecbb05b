"""The same losses by slice: file by file, short texts and long ones, early in a row and late."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from mixwright.evaluation.hybrid_documents import PLACES, Documents, per_token


@dataclass(frozen=True, kw_only=True)
class Slice:
    """One part of the tokens: `kind` is all, file, length or place. `losses`: system -> nats per token."""

    kind: str
    name: str
    documents: int
    tokens: int
    losses: dict[str, float]


def slices(documents: Documents, systems: Mapping[str, Tensor]) -> list[Slice]:
    """Everything first; a kind that would have one slice only is left out."""
    everyone = torch.ones(len(documents), dtype=torch.bool)
    everywhere = torch.ones(len(PLACES), dtype=torch.bool)
    parts = [("all", "all texts", everyone, everywhere)]
    names = list(dict.fromkeys(documents.files))
    files = [("file", n, torch.tensor([n == f for f in documents.files]), everywhere) for n in names]
    lengths = [("length", n, which, everywhere) for n, which in _by_length(documents).items()]
    places = [("place", n, everyone, which) for n, which in _by_place(documents).items()]
    for group in (files, lengths, places):
        parts += group if len(group) > 1 else []
    return [_slice(kind, name, rows, columns, documents, systems) for kind, name, rows, columns in parts]


def _slice(
    kind: str, name: str, rows: Tensor, columns: Tensor, documents: Documents, systems: Mapping[str, Tensor]
) -> Slice:
    tokens = documents.tokens[rows][:, columns]
    return Slice(
        kind=kind,
        name=name,
        documents=int((tokens.sum(-1) > 0).sum()),
        tokens=int(tokens.sum()),
        losses={system: per_token(sums[rows][:, columns], tokens) for system, sums in systems.items()},
    )


def _by_length(documents: Documents) -> dict[str, Bool[Tensor, " documents"]]:
    """Thirds of the documents by their tokens, as far as lengths differ."""
    tokens = documents.tokens.sum(-1)
    cuts = torch.quantile(tokens, torch.tensor([1 / 3, 2 / 3], dtype=tokens.dtype)).floor().tolist()
    bounds = [0.0, *sorted(set(cuts)), float(tokens.max())]
    found: dict[str, Tensor] = {}
    for low, high in zip(bounds, bounds[1:]):
        which = (tokens > low) & (tokens <= high)
        if which.any():
            found[f"texts of {int(tokens[which].min())} to {int(tokens[which].max())} tokens"] = which
    return found


def _by_place(documents: Documents) -> dict[str, Bool[Tensor, " places"]]:
    """The stretches of a row that have tokens."""
    found: dict[str, Tensor] = {}
    for at, low in enumerate(PLACES):
        if documents.tokens[:, at].sum() > 0:
            last = at + 1 == len(PLACES)
            name = f"after {low} tokens of context" if last else f"tokens {low + 1} to {PLACES[at + 1]} of a row"
            found[name] = torch.arange(len(PLACES)) == at
    return found
