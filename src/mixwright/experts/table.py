"""Tables of single-neuron experts: what an expert's rows are, whoever holds them."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mixwright.ops.neuron import Activation, Gradient, combine_neurons


class AbstractTable(nn.Module, ABC):
    """`num_experts` experts of `parts` rows (1: value; 2: in, out; 3: in, gate, out) of `width` numbers each."""

    num_experts: int
    parts: int
    width: int

    @abstractmethod
    def forward(
        self,
        x: Float[Tensor, "tokens width"],
        weights: Float[Tensor, "tokens k"],
        indices: Int[Tensor, "tokens k"],
        activation: Activation,
    ) -> Float[Tensor, "tokens width"]:
        """sum_k w_k e_{indices_k}(x)."""

    @abstractmethod
    def take(
        self, ids: Int[Tensor, " ids"]
    ) -> tuple[Float[Tensor, "ids parts width"], Float[Tensor, "ids inputs"] | None]:
        """The rows of some experts and their biases, to look at: no gradients, wherever they are kept."""


class NeuronTable(AbstractTable):
    """Rows in memory, `(experts, parts, width)`, the rows of one expert side by side; `bias` `(experts, parts - 1)`.

    One table may serve several layers. `gradient`: what its rows get in a backward pass: `dense`; `compact`, a sparse
    tensor of the retrieved rows; `auto`, whichever is smaller. `frozen` `(experts,)`: rows that no optimiser of ours
    changes. `before_read`: called with the ids that are about to be read.
    """

    def __init__(self, rows: Float[Tensor, "experts parts width"], bias: Tensor | None = None) -> None:
        super().__init__()
        self.num_experts, self.parts, self.width = rows.shape
        self.rows = nn.Parameter(rows)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.gradient: Gradient = "dense"
        self.before_read: list[Callable[[Tensor], None]] = []
        self.frozen: Bool[Tensor, " experts"] | None
        self.register_buffer("frozen", None)

    def forward(
        self,
        x: Float[Tensor, "tokens width"],
        weights: Float[Tensor, "tokens k"],
        indices: Int[Tensor, "tokens k"],
        activation: Activation,
    ) -> Float[Tensor, "tokens width"]:
        """sum_k w_k e_{indices_k}(x)."""
        for read in self.before_read:
            read(indices)
        return combine_neurons(x, self.rows, weights, indices, activation, self.bias, gradient=self.gradient)

    @torch.no_grad()
    def take(
        self, ids: Int[Tensor, " ids"]
    ) -> tuple[Float[Tensor, "ids parts width"], Float[Tensor, "ids inputs"] | None]:
        """Copies of some experts' rows and biases."""
        for read in self.before_read:
            read(ids)
        return self.rows[ids], None if self.bias is None else self.bias[ids]


def initial_rows(
    num_experts: int, parts: int, width: int, out_std: float, generator: torch.Generator | None = None
) -> Float[Tensor, "experts parts width"]:
    """Rows in and gate ~ N(0, 1 / width), so that <u, x> has the size of x's entries; rows out ~ N(0, out_std^2)."""
    rows = torch.empty(num_experts, parts, width)
    rows.normal_(std=width**-0.5, generator=generator)
    rows[:, -1].mul_(out_std * width**0.5)
    return rows
