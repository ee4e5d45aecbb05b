"""Episodes out of domains; which comes at a number is a function of the seed and that number, and of nothing else."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Generator, Tensor

from mixwright.data.domains import Domain
from mixwright.data.episodes import Episode
from mixwright.ops.rows import take


@dataclass(frozen=True, kw_only=True)
class FixedEpisodes:
    """N-way K-shot: `ways` classes of one domain, `shots` items of each to learn from, up to `queries` to be asked.

    A class takes part if it has more distinct items than `shots`. Groups of classes have no say here: the classes are
    drawn from the whole domain, as N-way K-shot tests are (Vinyals et al. 2016); hierarchy is Meta-Dataset's
    (`VariableEpisodes`).
    """

    domains: Sequence[Domain]
    ways: int
    shots: int
    queries: int
    seed: int = 0
    augmented: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for a domain that has no such episode."""
        if not self.domains:
            raise ValueError("no domain to draw episodes from; give one or more.")
        for name, least, value in (("ways", 2, self.ways), ("shots", 1, self.shots), ("queries", 1, self.queries)):
            if not _is_count(value) or value < least:
                raise ValueError(f"{name} {value!r}: expected {least} or more, a whole number.")
        for domain in self.domains:
            require_classes(domain, self.ways, self.shots + 1)

    def episode(self, index: int) -> Episode:
        """Episode number `index`."""
        generator = generator_of(self.seed, index)
        domain = self.domains[drawn([domain.weight for domain in self.domains], generator)]
        order = shuffled(large_enough(domain, self.shots + 1), generator)
        classes = distinct_classes(domain, order, self.ways, self.shots + 1)
        if len(classes) < self.ways:
            raise ValueError(
                f"domain {domain.name}: {len(classes)} classes have {self.shots + 1} items that no other class has, "
                f"and an episode needs {self.ways}; lower ways or shots."
            )
        chosen = [(label, shuffled(rows, generator)) for label, rows in classes]
        supports = [(label, rows[: self.shots]) for label, rows in chosen]
        asked = [(label, rows[self.shots : self.shots + self.queries]) for label, rows in chosen]
        return made(domain, index, supports, asked, generator if self.augmented else None)


@dataclass(frozen=True, kw_only=True)
class VariableEpisodes:
    """Ways, shots and their balance vary from episode to episode (Triantafillou et al. 2020, Meta-Dataset, sec. 3.2).

    A domain is drawn by weight; with `hierarchy`, then one of its groups, all alike; a number of classes from
    `ways[0]` to `ways[1]`; of each up to `queries` items to be asked, at most half of the smallest class. With b drawn
    from (0, 1], classes of n items give min(`support`, sum floor(b min(`per_class`, n - queries)) + 1) items to learn
    from, shared out by n exp(u), u from -log `imbalance` to log `imbalance`, one for each class at the least.
    """

    domains: Sequence[Domain]
    ways: tuple[int, int] = (5, 50)
    queries: int = 10
    support: int = 500
    per_class: int = 100
    imbalance: float = 2.0
    hierarchy: bool = True
    seed: int = 0
    augmented: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for settings that allow no episode, and a domain that has none."""
        if not self.domains:
            raise ValueError("no domain to draw episodes from; give one or more.")
        if len(self.ways) != 2 or not all(map(_is_count, self.ways)) or not 2 <= self.ways[0] <= self.ways[1]:
            raise ValueError(f"ways {' to '.join(map(str, self.ways))}: expected two rising numbers, of 2 or more.")
        if self.queries < 1 or self.per_class < 1 or self.support < self.ways[1] or self.imbalance < 1:
            raise ValueError(
                f"queries {self.queries}, per_class {self.per_class}, support {self.support}, imbalance "
                f"{self.imbalance:g}: expected 1 or more each, and a support of at least {self.ways[1]} items, one for "
                "each way."
            )
        for domain in self.domains:
            require_classes(domain, 2, 2)

    def episode(self, index: int) -> Episode:
        """Episode number `index`; a domain with fewer classes than the fewest ways gives all that it has."""
        generator = generator_of(self.seed, index)
        domain = self.domains[drawn([domain.weight for domain in self.domains], generator)]
        there = large_enough(domain, 2)
        nodes = _nodes(domain, there, min(self.ways[0], len(there))) if self.hierarchy else [there]
        classes = shuffled(nodes[int(torch.randint(len(nodes), (), generator=generator))], generator)
        fewest, most = (min(ways, len(classes)) for ways in self.ways)
        ways = int(torch.randint(fewest, most + 1, (), generator=generator))
        chosen = [(label, shuffled(rows, generator)) for label, rows in distinct_classes(domain, classes, ways, 2)]
        if len(chosen) < 2:
            raise ValueError(f"domain {domain.name}: all but one of its classes hold copies of each other's items.")
        queries = min(self.queries, min(len(rows) for _, rows in chosen) // 2)
        shots = self._shots([len(rows) for _, rows in chosen], queries, generator)
        asked = [(label, rows[:queries]) for label, rows in chosen]
        supports = [(label, rows[queries : queries + n]) for (label, rows), n in zip(chosen, shots, strict=True)]
        return made(domain, index, supports, asked, generator if self.augmented else None)

    def _shots(self, sizes: Sequence[int], queries: int, generator: Generator) -> list[int]:
        """How many items of each class are learned from."""
        share = 1 - float(torch.rand((), generator=generator))  # in (0, 1]
        wanted = sum(int(share * min(self.per_class, size - queries)) + 1 for size in sizes)
        over = min(self.support, wanted) - len(sizes)
        tilt = math.log(self.imbalance) * (2 * torch.rand(len(sizes), generator=generator, dtype=torch.float64) - 1)
        shares = (torch.tensor(sizes, dtype=torch.float64) * tilt.exp()).tolist()
        return [
            min(1 + int(over * part / sum(shares)), size - queries) for part, size in zip(shares, sizes, strict=True)
        ]


Rows = tuple[int, Sequence[int]]
"""A class of a domain, and items of it."""


def made(
    domain: Domain, index: int, support: Sequence[Rows], query: Sequence[Rows], generator: Generator | None
) -> Episode:
    """The episode of these items, read in one go so that texts are of one width; its labels are the classes' places."""
    rows = [row for part in (support, query) for _, of_class in part for row in of_class]
    shots = sum(len(of_class) for _, of_class in support)
    inputs = domain.read(rows, generator)
    return Episode(
        take(inputs, slice(0, shots)),
        _places(support),
        take(inputs, slice(shots, None)),
        _places(query),
        {
            "domain": domain.name,
            "index": index,
            "classes": tuple(domain.class_names[label] for label, _ in support),
            "rows": tuple(rows),
        },
    )


def large_enough(domain: Domain, least: int) -> list[int]:
    """The classes with so many distinct items or more."""
    return [label for label, rows in enumerate(domain.rows) if len(rows) >= least]


def _nodes(domain: Domain, classes: Sequence[int], least: int) -> list[list[int]]:
    """The groups, and groups of groups, that have so many of these classes; all of them together where none has.

    A group's name is a path: `bird/owl` lies in `bird`.
    """
    if not domain.groups:
        return [list(classes)]
    nodes: dict[str, list[int]] = {}
    for label in classes:
        steps = domain.groups[label].split("/")
        for depth in range(1, len(steps) + 1):
            nodes.setdefault("/".join(steps[:depth]), []).append(label)
    return [members for members in nodes.values() if len(members) >= least] or [list(classes)]


def distinct_classes(domain: Domain, classes: Sequence[int], most: int, least: int) -> list[Rows]:
    """The first `most` of these classes, each with its items but for copies of items of those before it.

    A class that has fewer than `least` of its own is passed over.
    """
    chosen: list[Rows] = []
    seen: set[str] = set()
    for label in classes:
        rows = [row for row in domain.rows[label] if domain.contents[row] not in seen]
        if len(rows) >= least and len(chosen) < most:
            chosen.append((label, rows))
            seen.update(domain.contents[row] for row in domain.rows[label])
    return chosen


def require_classes(domain: Domain, ways: int, least: int) -> None:
    """Raises ValueError for a domain with too few classes that have so many items."""
    there = len(large_enough(domain, least))
    if there < ways:
        sizes = sorted((len(rows) for rows in domain.rows), reverse=True)
        raise ValueError(
            f"domain {domain.name}: {there} of its {len(sizes)} classes have {least} distinct items or more, and an "
            f"episode needs {ways} such classes; add items (the largest class has {sizes[0] if sizes else 0}), or "
            "lower ways or shots."
        )


def generator_of(seed: int, index: int) -> Generator:
    """Randomness that follows from a seed and a number alone."""
    digest = hashlib.sha256(f"{seed} {index}".encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:7]))


def shuffled(values: Sequence[int], generator: Generator) -> list[int]:
    """The values in random order."""
    return [values[place] for place in torch.randperm(len(values), generator=generator).tolist()]


def drawn(weights: Sequence[float], generator: Generator) -> int:
    """A place, as often as its weight says."""
    return int(torch.multinomial(torch.tensor(weights, dtype=torch.float64), 1, generator=generator))


def _is_count(value: object) -> bool:
    return isinstance(value, Integral)


def _places(parts: Sequence[Rows]) -> Tensor:
    return torch.tensor([place for place, (_, rows) in enumerate(parts) for _ in rows], dtype=torch.long)
