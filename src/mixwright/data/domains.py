"""A domain: items of one kind, each of a class, out of which episodes are drawn."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Generator, Tensor

from mixwright.ops.rows import Inputs, count, take

Reader = Callable[[Sequence[Any], Generator | None], Inputs]
"""(items, generator) -> these items as a model reads them; with a generator they are augmented."""


@dataclass(frozen=True)
class Domain:
    """Items in memory, or what `reader` makes items of; `labels[i]`, a number in `class_names`, is the class of item i.

    `groups`: for each class the larger class that it is of, where episodes are to stay within one. `weight`: how often
    it is drawn beside other domains. `keys`: a name for each item's content, so that copies are known as such.
    """

    name: str
    items: Any
    labels: Sequence[int]
    class_names: tuple[str, ...]
    groups: tuple[str, ...] = ()
    weight: float = 1.0
    reader: Reader | None = None
    keys: Sequence[str] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        """Raises ValueError for labels, groups or a weight that do not go with the rest, and for NaN."""
        items = count(self.items) if isinstance(self.items, Tensor | Mapping) else len(self.items)
        if len(self.labels) != items:
            raise ValueError(f"domain {self.name}: {len(self.labels)} labels for {items} items; give one for each.")
        strange = next((label for label in self.labels if not 0 <= label < len(self.class_names)), None)
        if strange is not None:
            raise ValueError(
                f"domain {self.name}: label {strange}; expected 0 to {len(self.class_names) - 1}, as class_names say."
            )
        if self.groups and len(self.groups) != len(self.class_names):
            raise ValueError(f"domain {self.name}: {len(self.groups)} groups for {len(self.class_names)} classes.")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"domain {self.name}: weight {self.weight:g}; expected a number above 0.")
        for tensor in self._tensors():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                row = int((~torch.isfinite(tensor)).reshape(len(tensor), -1).any(1).nonzero()[0])
                raise ValueError(
                    f"domain {self.name}: item {row} has NaN or infinite values; repair it or leave it out."
                )

    def __len__(self) -> int:
        return len(self.labels)

    def with_reader(self, reader: Reader | None) -> "Domain":
        """The same domain, its items read in another way."""
        return replace(self, reader=reader)

    def read(self, rows: Sequence[int], generator: Generator | None = None) -> Inputs:
        """Items as a model reads them; with a generator they are augmented, where the domain can."""
        if self.reader is not None:
            return self.reader([self.items[row] for row in rows], generator)
        if not isinstance(self.items, Tensor | Mapping):
            raise ValueError(f"domain {self.name}: its items are no tensors, and nothing reads them; see with_reader.")
        return take(self.items, rows)

    @cached_property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        """The items of each class, without copies of one another."""
        of_class: list[dict[str, int]] = [{} for _ in self.class_names]
        for row, label in enumerate(self.labels):
            of_class[label].setdefault(self.contents[row], row)
        return tuple(tuple(found.values()) for found in of_class)

    @cached_property
    def contents(self) -> Sequence[str]:
        """A name for the content of each item: equal for copies, and for nothing else."""
        if self.keys:
            return self.keys
        if isinstance(self.items, Tensor | Mapping):
            return [_digest(take(self.items, slice(row, row + 1))) for row in range(len(self))]
        return [hashlib.sha256(repr(item).encode()).hexdigest() for item in self.items]

    def _tensors(self) -> list[Tensor]:
        if isinstance(self.items, Mapping):
            return list(cast(Mapping[str, Tensor], self.items).values())
        return [self.items] if isinstance(self.items, Tensor) else []

    @cached_property
    def digest(self) -> str:
        """A name for all of it: contents, classes, groups."""
        said = hashlib.sha256(repr((self.name, self.class_names, self.groups, self.weight)).encode())
        for content, label in zip(self.contents, self.labels, strict=True):
            said.update(f"{content} {label}\n".encode())
        return said.hexdigest()


def tensor_domain(name: str, items: Inputs, labels: Tensor | Sequence[int], **settings: Any) -> Domain:
    """A domain of items in memory; classes are named by their numbers unless `class_names` is given.

    Raises ValueError as `Domain`.
    """
    numbers = [int(label) for label in torch.as_tensor(labels).tolist()]
    settings.setdefault("class_names", tuple(str(label) for label in range(max(numbers, default=-1) + 1)))
    return Domain(name, items, numbers, **settings)


def _digest(row: Inputs) -> str:
    digest = hashlib.sha256()
    for name, tensor in [("", row)] if isinstance(row, Tensor) else sorted(row.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
