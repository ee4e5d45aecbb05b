"""Tables of single-neuron experts: what an expert's rows are, whoever holds them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mixwright.ops.huge_pages import SpareMemory, advise, on_huge_pages
from mixwright.ops.neuron import Activation, Gradient, combine_neurons


class AbstractTable(nn.Module, ABC):
    """`num_experts` experts of `parts` rows (1: value; 2: in, out; 3: in, gate, out) of `width` numbers each.

    `collective`: several processes hold it, so that all of them must call it equally often, be it without tokens.
    """

    num_experts: int
    parts: int
    width: int
    collective: bool = False

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
    tensor of the retrieved rows; `auto`, whichever is smaller. `frozen` `(experts,)`: rows that get no gradient and
    that no optimiser of ours changes. `before_read`: called with the ids that are about to be read. `provenance`: where
    rows came from, see `methods/peer/growth.py`.
    """

    def __init__(self, rows: Float[Tensor, "experts parts width"], bias: Tensor | None = None) -> None:
        super().__init__()
        if rows.shape[1] not in (1, 2, 3):
            raise ValueError(f"rows has {rows.shape[1]} parts; expected 1 (value), 2 (in, out) or 3 (in, gate, out).")
        if bias is not None and bias.shape != (rows.shape[0], rows.shape[1] - 1):
            raise ValueError(
                f"bias has shape {tuple(bias.shape)}; rows of shape {tuple(rows.shape)} take one of "
                f"({rows.shape[0]}, {rows.shape[1] - 1})."
            )
        self.num_experts, self.parts, self.width = rows.shape
        self.rows = nn.Parameter(advise(rows, collapse=True))
        self.bias = None if bias is None else nn.Parameter(bias)
        self.gradient: Gradient = "dense"
        self.before_read: list[Callable[[Tensor], None]] = []
        self._spare = SpareMemory()
        self.frozen: Bool[Tensor, " experts"] | None
        self.provenance: Int[Tensor, "blocks fields"] | None
        self.register_buffer("frozen", None)
        self.register_buffer("provenance", None)

    def forward(
        self,
        x: Float[Tensor, "tokens width"],
        weights: Float[Tensor, "tokens k"],
        indices: Int[Tensor, "tokens k"],
        activation: Activation,
        *,
        reach: int | None = None,
    ) -> Float[Tensor, "tokens width"]:
        """sum_k w_k e_{indices_k}(x). `reach`: while no id is beyond it, to the bit the sum of a table so long."""
        for read in self.before_read:
            read(indices)
        rows, bias = self.rows, self.bias
        first = self.num_experts if reach is None or bool((indices >= reach).any()) else reach
        if self.frozen is not None or first < self.num_experts:
            rows = cast(Tensor, _Rows.apply(rows, first, self.frozen))
            bias = None if bias is None else cast(Tensor, _Rows.apply(bias, first, self.frozen))
        return combine_neurons(x, rows, weights, indices, activation, bias, gradient=self.gradient, spare=self._spare)

    @torch.no_grad()
    def take(
        self, ids: Int[Tensor, " ids"]
    ) -> tuple[Float[Tensor, "ids parts width"], Float[Tensor, "ids inputs"] | None]:
        """Copies of some experts' rows and biases."""
        for read in self.before_read:
            read(ids)
        return self.rows[ids], None if self.bias is None else self.bias[ids]

    @torch.no_grad()
    def catch_up(self) -> None:
        """Have every row as it would be read now: before all are copied or saved, or some written to from outside."""
        if self.before_read:
            ids = torch.arange(self.num_experts, device=self.rows.device)
            for read in self.before_read:
                read(ids)

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or a pickle, is of rows as they would be read, and nobody follows it."""
        self.catch_up()
        return {**self.__dict__, "before_read": []}

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.catch_up()
        super()._save_to_state_dict(*args, **kwargs)

    @torch.no_grad()
    def append(self, rows: Float[Tensor, "new parts width"], bias: Tensor | None = None) -> None:
        """More experts after the last: ids stay valid, the parameters stay the same objects, gradients are dropped."""
        self.rows.data = advise(torch.cat([self.rows.data, rows.to(self.rows)]), collapse=True)
        self.rows.grad = None
        if self.bias is not None:
            more = self.bias.new_zeros(len(rows), self.parts - 1) if bias is None else bias.to(self.bias)
            self.bias.data = torch.cat([self.bias.data, more])
            self.bias.grad = None
        if self.frozen is not None:
            self.frozen = torch.cat([self.frozen, self.frozen.new_zeros(len(rows))])
        self.num_experts += len(rows)

    def train(self, mode: bool = True) -> "NeuronTable":
        """In training the memory of the last step's gradient is kept for the next one's."""
        if not mode:
            self._spare.release()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NeuronTable":
        """Rows that move stay on huge pages."""
        super()._apply(fn, recurse)
        advise(self.rows.data, collapse=True)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """What growth added is taken over from the state: rows, and the buffers about them."""
        self.catch_up()
        held = state_dict.get(f"{prefix}rows")
        if isinstance(held, Tensor) and held.shape[1:] == self.rows.shape[1:] and len(held) > self.num_experts:
            self.append(self.rows.new_zeros(len(held) - self.num_experts, self.parts, self.width))
        for name in ("frozen", "provenance"):
            found = state_dict.get(f"{prefix}{name}")
            if isinstance(found, Tensor) and (getattr(self, name) is None or getattr(self, name).shape != found.shape):
                self.register_buffer(name, torch.zeros_like(found, device=self.rows.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class _Rows(torch.autograd.Function):
    """The first rows of a table; frozen ones get no gradient. Gradients stay compact where they are."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, first: int, frozen: Tensor | None) -> Tensor:
        ctx.shape, ctx.frozen = rows.shape, frozen
        return rows[:first]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient, frozen = gradients[0], ctx.frozen
        if gradient.is_sparse:
            gradient = gradient.coalesce()
            ids, values = gradient.indices(), gradient.values()
            if frozen is not None:
                free = ~frozen[ids[0]]
                ids, values = ids[:, free], values[free]
            whole = torch.sparse_coo_tensor(ids, values, ctx.shape, is_coalesced=True, check_invariants=False)
            return whole, None, None
        if len(gradient) < ctx.shape[0]:
            gradient = torch.cat([gradient, gradient.new_zeros(ctx.shape[0] - len(gradient), *ctx.shape[1:])])
        if frozen is not None:
            gradient = gradient.masked_fill(frozen.view(-1, *[1] * (gradient.dim() - 1)), 0)
        return gradient, None, None


def initial_rows(
    num_experts: int, parts: int, width: int, out_std: float, generator: torch.Generator | None = None
) -> Float[Tensor, "experts parts width"]:
    """Rows in and gate ~ N(0, 1 / width), so that <u, x> has the size of x's entries; rows out ~ N(0, out_std^2)."""
    rows = on_huge_pages((num_experts, parts, width))
    rows.normal_(std=width**-0.5, generator=generator)
    rows[:, -1].mul_(out_std * width**0.5)
    return rows


def out_std_for(
    rms: float, heads: int, top_k: int, gate: str, activation: Activation | None, num_experts: int
) -> float:
    """The deviation of rows out under which outputs have this root mean square, for inputs of one.

    Var y = sum_k E[w^2] E[act(z)^2] sigma^2, z normal. Gates that add up to one are taken to be even; scores of the
    retrieved to be those of the best of N with the variance 2/3 that standardised queries and fresh sub-keys give.
    `activation` None: a memory of values.
    """
    hidden = 1.0 if activation is None else _SQUARES[activation]
    best = 4 / 3 * math.log(max(2, num_experts))
    squares = {"softmax": top_k**-2, "renormalised": top_k**-2, "relu": best, "one": 1.0}
    sigmoid = (1 + math.exp(-(best**0.5))) ** -2
    return rms / math.sqrt(heads * top_k * squares.get(gate, sigmoid) * hidden)


_SQUARES: dict[Activation, float] = {"gelu": 0.425, "gelu_tanh": 0.425, "relu": 0.5, "silu": 0.356, "relu_squared": 1.5}
