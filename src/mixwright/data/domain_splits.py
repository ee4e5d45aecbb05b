"""A domain in two: by class, so that the second part holds tasks nobody trained on, or by item."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mixwright.data.domains import Domain
from mixwright.data.episode_samplers import generator_of
from mixwright.ops.rows import take


def split_classes(domain: Domain, share: float, seed: int = 0) -> tuple[Domain, Domain]:
    """The domain without a share of its classes, and these alone; items that both would have are in the first only.

    Raises ValueError where either part would have fewer than two classes.
    """
    order = torch.randperm(len(domain.class_names), generator=generator_of(seed, 0)).tolist()
    held = set(order[: round(share * len(order))])
    if min(len(held), len(order) - len(held)) < 2:
        raise ValueError(
            f"domain {domain.name}: {len(held)} of {len(order)} classes held out ({share:g}); both parts need two."
        )
    kept = {domain.contents[row] for row, label in enumerate(domain.labels) if label not in held}
    return (
        _part(domain, lambda row: domain.labels[row] not in held),
        _part(domain, lambda row: domain.labels[row] in held and domain.contents[row] not in kept),
    )


def split_items(domain: Domain, share: float, seed: int = 0) -> tuple[Domain, Domain]:
    """The domain without a share of each class's items, and these; copies of an item are on the same side.

    Raises ValueError for a share that is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"share {share:g}: expected more than 0 and less than 1.")
    held: dict[str, bool] = {}
    for label, rows in enumerate(domain.rows):
        order = torch.randperm(len(rows), generator=generator_of(seed, label)).tolist()
        for place, row in enumerate(order):
            held.setdefault(domain.contents[rows[int(row)]], place < round(share * len(rows)))
    return (
        _part(domain, lambda row: not held[domain.contents[row]]),
        _part(domain, lambda row: held[domain.contents[row]]),
    )


def _part(domain: Domain, holds: Callable[[int], bool]) -> Domain:
    """The items that a part holds; classes without any go."""
    rows = [row for row in range(len(domain)) if holds(row)]
    classes = sorted({domain.labels[row] for row in rows})
    places = {label: place for place, label in enumerate(classes)}
    tensors = isinstance(domain.items, Tensor | dict)
    return replace(
        domain,
        items=take(domain.items, rows) if tensors else [domain.items[row] for row in rows],
        labels=[places[domain.labels[row]] for row in rows],
        class_names=tuple(domain.class_names[label] for label in classes),
        groups=tuple(domain.groups[label] for label in classes) if domain.groups else (),
        keys=[domain.contents[row] for row in rows],
    )
