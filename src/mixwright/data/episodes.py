"""An episode: some labelled items (the support), and items to be told apart by them alone (the query)."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from mixwright.ops.rows import Inputs, count, move
from mixwright.routing import SupportSet


@dataclass(frozen=True, slots=True)
class Episode:
    """A small classification task: `support` with `labels` (shots,) from 0 to ways - 1, `query` with `query_labels`.

    Inputs are one tensor, or several by name, rows first. `meta` says where it comes from: `domain`, `index`,
    `classes` (the names of the classes, by label).
    """

    support: Inputs
    labels: Tensor
    query: Inputs
    query_labels: Tensor | None = None
    meta: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def weight(self) -> int:
        """What it counts in the loss of a step: an episode is one."""
        return 1

    @property
    def where(self) -> tuple[str, ...]:
        """Where it comes from, for messages."""
        return (f"{self.meta.get('domain', 'episode')}#{self.meta.get('index', '?')}",)

    @property
    def ways(self) -> int:
        """The number of classes."""
        return int(self.labels.max()) + 1

    @property
    def support_set(self) -> SupportSet:
        """The support as routers take it."""
        return SupportSet(self.support, self.labels)

    def to(self, device: torch.device | str) -> "Episode":
        """The same episode on another device."""
        return replace(
            self,
            support=move(self.support, device),
            labels=self.labels.to(device),
            query=move(self.query, device),
            query_labels=None if self.query_labels is None else self.query_labels.to(device),
        )


class EpisodeSource(Protocol):
    """Whatever has an episode for every number, always the same one."""

    def episode(self, index: int) -> Episode:
        """Episode number `index`, a function of the source's settings and `index` alone."""
        ...


def check_episode(episode: Episode) -> None:
    """Raises ValueError or TypeError naming what of an episode is not as it must be, and what to do."""
    where = episode.where[0]
    check_support(episode.support, episode.labels, where=where)
    _check_inputs(episode.query, f"{where}: query")
    _check_alike(episode.support, episode.query, where)
    if episode.query_labels is not None:
        _check_labels(episode.query_labels, count(episode.query), f"{where}: query_labels")
        strange = episode.query_labels[(episode.query_labels < 0) | (episode.query_labels >= episode.ways)]
        if len(strange):
            raise ValueError(
                f"{where}: query_labels has {int(strange[0])}; the support has classes 0 to {episode.ways - 1}, and "
                "a class without support cannot be recognised."
            )


def check_support(inputs: Any, labels: Any, *, where: str = "support") -> None:
    """Raises ValueError or TypeError naming what of a support set is not as it must be, and what to do.

    Classes may be as unbalanced as they like; each from 0 to the last needs one item, and there are two or more.
    """
    _check_inputs(inputs, where if where == "support" else f"{where}: support")
    _check_labels(labels, count(inputs), f"{where}: labels")
    numbers = torch.bincount(labels[labels >= 0])
    if bool((labels < 0).any()):
        raise ValueError(f"{where}: labels has {int(labels.min())}; expected 0 to the number of classes less one.")
    if len(numbers) < 2:
        raise ValueError(f"{where}: every label is 0; one class leaves nothing to tell apart, give two or more.")
    missing = [label for label, number in enumerate(numbers.tolist()) if number == 0]
    if missing:
        raise ValueError(
            f"{where}: labels go up to {len(numbers) - 1}, and class {missing[0]} has no item in the support; number "
            "the classes 0, 1, 2, ... without gaps."
        )


def _check_inputs(inputs: Any, where: str) -> None:
    tensors: Mapping[str, Any] = {"": inputs}
    if isinstance(inputs, Mapping):
        tensors = {f"[{name!r}]": tensor for name, tensor in cast(Mapping[str, Any], inputs).items()}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{where}{name}: {_named(tensor)}; expected a tensor, or a dict of tensors, rows first.")
    if count(inputs) == 0:
        raise ValueError(f"{where}: empty; expected one item or more.")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            row = int((~torch.isfinite(tensor)).flatten(1).any(1).nonzero()[0]) if tensor.ndim > 1 else 0
            raise ValueError(f"{where}{name}: item {row} has NaN or infinite values; repair it or leave it out.")


def _check_labels(labels: Any, items: int, where: str) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{where}: {_named(labels)}; expected a tensor of class numbers, one for each item.")
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"{where}: of {labels.dtype}; expected whole numbers (torch.long).")
    if labels.shape != (items,):
        raise ValueError(f"{where}: shape {tuple(labels.shape)} for {items} items; expected ({items},).")


def _check_alike(support: Inputs, query: Inputs, where: str) -> None:
    """Query items are of the support's kind and size; texts may be longer or shorter."""
    if isinstance(support, Tensor) and isinstance(query, Tensor):
        if support.shape[1:] != query.shape[1:]:
            raise ValueError(
                f"{where}: query items of shape {tuple(query.shape[1:])}, support items of "
                f"{tuple(support.shape[1:])}; bring them to one size."
            )
    elif isinstance(support, Tensor) or isinstance(query, Tensor) or set(support) != set(query):
        raise ValueError(f"{where}: support and query are of two kinds; give both as tensors, or as dicts alike.")


def _named(value: Any) -> str:
    return repr(value[:40]) if isinstance(value, str) else f"a {type(value).__name__}"
