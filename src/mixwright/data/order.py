"""Which example comes when: a function of seed and position, so that a resumed run computes it and replays nothing."""

import hashlib
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_SHORTEST_BLOCK = 1024


class Order:
    """Endless shuffled passes over `size` examples; pass e is the permutation drawn from (seed, e)."""

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError("no examples to put in order; the data set is empty.")
        self.size = size
        self.seed = seed
        self._epoch = -1
        self._permutation: list[int] = []

    def at(self, position: int) -> int:
        """The index of the example at `position` in the endless sequence."""
        epoch, offset = divmod(position, self.size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            self._permutation = torch.randperm(self.size, generator=generator).tolist()
            self._epoch = epoch
        return self._permutation[offset]


class MixedOrder:
    """An endless sequence over the examples of several tasks, which lie one task after another.

    Task t has the share p_t = min(n_t, cap)^(1/temperature) / sum: by size at temperature 1, all alike at a large one.
    The sequence goes in blocks, each of which holds a task as often as the other blocks do: its share of the block to
    the nearest whole example, and at least one. A block is shuffled by (seed, block); a task's own examples come in
    passes of `Order`.
    """

    def __init__(self, sizes: Sequence[int], seed: int, *, temperature: float = 1.0, cap: int | None = None) -> None:
        if not sizes or temperature <= 0:
            raise ValueError(f"{len(sizes)} tasks at temperature {temperature}; expected one or more, and above 0.")
        capped = [min(size, cap or size) for size in sizes]
        length = sum(capped) * math.ceil(_SHORTEST_BLOCK / max(1, sum(capped)))
        self.seed = seed
        self.counts = apportion([(size / max(capped)) ** (1.0 / temperature) for size in capped], length)
        self._orders = [Order(size, _own_seed(seed, task)) for task, size in enumerate(sizes)]
        self._starts = [0, *itertools.accumulate(sizes)]
        self._block = -1
        self._tasks, self._ranks = torch.empty(0), torch.empty(0)

    def at(self, position: int) -> int:
        """The index of the example at `position` in the endless sequence."""
        block, offset = divmod(position, sum(self.counts))
        if block != self._block:
            self._tasks, self._ranks = self._shuffled(block)
            self._block = block
        task = int(self._tasks[offset])
        drawn = block * self.counts[task] + int(self._ranks[offset])
        return self._starts[task] + self._orders[task].at(drawn)

    def _shuffled(self, block: int) -> tuple[Tensor, Tensor]:
        """Which task stands at each place of a block, and how often it stood there before within the block."""
        counts = torch.tensor(self.counts)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + block) % 2**63)
        tasks = torch.repeat_interleave(torch.arange(len(counts)), counts)
        tasks = tasks[torch.randperm(len(tasks), generator=generator)]
        ranks = torch.empty_like(tasks)
        within = torch.arange(len(tasks)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        ranks[tasks.argsort(stable=True)] = within
        return tasks, ranks


def apportion(weights: Sequence[float], length: int) -> list[int]:
    """`length` places in proportion to `weights`, by largest remainders (Hamilton), and at least one for each."""
    assert length >= len(weights)
    quotas = [weight / sum(weights) * length for weight in weights]
    counts = [max(1, math.floor(quota + 1e-9)) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: counts[i] - quotas[i])
    for i in itertools.islice(itertools.cycle(by_remainder), max(0, length - sum(counts))):
        counts[i] += 1
    while sum(counts) > length:
        counts[max(range(len(counts)), key=lambda i: counts[i] - quotas[i] if counts[i] > 1 else -math.inf)] -= 1
    return counts


def _own_seed(seed: int, task: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {task}".encode()).digest()[:7])
