"""Which example comes when: a function of seed and position, so that a resumed run computes it and replays nothing."""

import torch


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
