"""Tables whose rows are brought when they are needed: from a disk, or out of fewer bits."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixwright.experts.table import AbstractTable
from mixwright.ops.neuron import DENSE_BELOW, Activation, combine_neurons

_BUDGET = 1 << 28  # bytes of brought rows at a time


class Brought(NamedTuple):
    """Rows and biases of some experts, ready to be used."""

    rows: Float[Tensor, "ids parts width"]
    bias: Float[Tensor, "ids inputs"] | None


class AbstractFetchedTable(AbstractTable):
    """Each retrieved expert is brought once for a call, then the usual sum runs over what was brought.

    Rows do not learn; `x` and the weights get their gradients. Tokens are taken in parts where their rows would need
    more than 256 MiB.
    """

    def forward(
        self,
        x: Float[Tensor, "tokens width"],
        weights: Float[Tensor, "tokens k"],
        indices: Int[Tensor, "tokens k"],
        activation: Activation,
    ) -> Float[Tensor, "tokens width"]:
        """sum_k w_k e_{indices_k}(x)."""
        found = self.in_place(x, weights, indices, activation)
        if found is not None:
            return found
        asked = torch.is_grad_enabled() and weights.requires_grad
        used = torch.ones_like(indices, dtype=torch.bool) if asked else weights != 0  # weight 0: it is not read
        parts = [
            self._combine(x[tokens], weights[tokens], indices[tokens], ids, activation)
            for tokens, ids in self._parts(indices, used, 0)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def take(
        self, ids: Int[Tensor, " ids"]
    ) -> tuple[Float[Tensor, "ids parts width"], Float[Tensor, "ids inputs"] | None]:
        """The rows of some experts and their biases, as they are used."""
        unique, back = ids.unique(return_inverse=True)
        rows, bias = self.fetch(unique)
        return rows[back], None if bias is None else bias[back]

    @abstractmethod
    def fetch(self, ids: Int[Tensor, " ids"]) -> Brought:
        """Rows and biases of ids that are distinct and ascending, on their device."""

    def in_place(
        self, x: Tensor, weights: Tensor, indices: Tensor, activation: Activation
    ) -> Float[Tensor, "tokens width"] | None:
        """The sum without bringing anything, where there is a way to it."""
        del x, weights, indices, activation

    def _combine(
        self, x: Tensor, weights: Tensor, indices: Tensor, ids: Tensor, activation: Activation
    ) -> Float[Tensor, "tokens width"]:
        if not len(ids):
            return torch.zeros_like(x)
        rows, bias = self.fetch(ids)
        least = DENSE_BELOW * indices.shape[1]  # a table of fewer experts is summed in another way
        if self.num_experts < least:
            rows, bias = (None if t is None else _spread(t, ids, self.num_experts) for t in (rows, bias))
            there = indices
        else:
            there = torch.searchsorted(ids, indices).clamp_(max=len(ids) - 1)
            if len(ids) < least:
                own = torch.arange(len(ids), device=ids.device)
                rows, bias = (None if t is None else _spread(t, own, least) for t in (rows, bias))
        assert rows is not None
        return combine_neurons(x, rows, weights, there, activation, bias)

    def _parts(self, indices: Tensor, used: Tensor, start: int) -> Iterator[tuple[slice, Tensor]]:
        """Ranges of tokens with their distinct ids, halved until those fit the budget."""
        ids = indices[used].unique()
        if len(indices) < 2 or len(ids) * self.parts * self.width * 4 <= _BUDGET:
            yield slice(start, start + len(indices)), ids
            return
        half = len(indices) // 2
        yield from self._parts(indices[:half], used[:half], start)
        yield from self._parts(indices[half:], used[half:], start + half)


def _spread(values: Tensor, places: Tensor, count: int) -> Tensor:
    """`values` at their places among zeros."""
    return values.new_zeros(count, *values.shape[1:]).index_copy_(0, places, values)
