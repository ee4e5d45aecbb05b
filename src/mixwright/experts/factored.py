"""Experts that combine factors: a low-rank change is built for each choice, and then it is a plain LoRA."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mixwright.experts.base import AbstractExperts
from mixwright.experts.factor_cache import FactorCache
from mixwright.routing import Condition, Routing


class AbstractFactored(AbstractExperts):
    """y = (1/rank) (x A_w) B_w, with A_w and B_w built from the routing weights (Ponti et al. 2022, section 2.2).

    Weights may be `(experts,)`, or have one axis for each leading axis of x and the experts; experts that choose anew
    at `positions` (order positions, heads) take one axis more, before the experts: `(batch, 1, positions, experts)`.
    What varies along the batch only is built once for each distinct choice: rows of the same `condition.task_ids` and
    equal weights are taken for one, and the gradient of that choice goes to the first of them. What varies by token is
    never built. In eval mode, where no gradient is recorded, the factors are kept; they are built anew when a leaf or
    the routing changes (writes through `.data` can't be seen; `forget()` after them). Leaves stay float32 in a narrower
    model, and factors are built in float32 under autocast.
    """

    rank: int
    d_in: int
    d_out: int
    positions: int | None

    def __init__(self, num_experts: int, rank: int, d_in: int, d_out: int, positions: int | None) -> None:
        super().__init__()
        self.num_experts, self.rank, self.d_in, self.d_out = num_experts, rank, d_in, d_out
        self.positions = positions
        self._kept = FactorCache()

    @abstractmethod
    def factors(
        self, weights: Float[Tensor, "choices *positions experts"]
    ) -> tuple[Float[Tensor, "choices rank d_in"], Float[Tensor, "choices rank d_out"]]:
        """A_w and B_w of every choice, in float32 or wider. The change of the weight is (1/rank) B_w^T A_w."""

    @abstractmethod
    def by_token(
        self, x: Float[Tensor, "tokens d_in"], weights: Float[Tensor, "tokens *positions experts"]
    ) -> Float[Tensor, "tokens d_out"]:
        """(x A_w) B_w where every token has weights of its own."""

    @abstractmethod
    def contribution(
        self, weights: Float[Tensor, "choices *positions experts"]
    ) -> Float[Tensor, "choices orders experts experts"]:
        """<D_s, D_p> of the parts of each choice's update, in float64, from r x r Grams: no factor and no update built.

        D_s = (A_s B_w + A_w B_s) / (2 rank), where the A_s of all experts sum to A_w and the B_s to B_w; where order
        positions choose for themselves, once for each of them (marginals), else `orders` is 1. A row sums to
        <D_s, update>, all of them to the squared Frobenius norm of the update.
        """

    def forward(
        self, x: Float[Tensor, "*batch d_in"], routing: Routing, condition: Condition
    ) -> Float[Tensor, "*batch d_out"]:
        """(1/rank) (x A_w) B_w."""
        return self._combined(x, routing, condition) / self.rank

    def _combined(self, x: Tensor, routing: Routing, condition: Condition) -> Tensor:
        weights = self.weights(routing, x.dim())
        by_row = weights.shape[: x.dim() - 1]
        if by_row[1:].numel() != 1:
            tokens = x.reshape(-1, self.d_in)
            own = weights.expand(*x.shape[:-1], *weights.shape[x.dim() - 1 :]).flatten(0, x.dim() - 2)
            with torch.autocast(x.device.type, enabled=False):
                out = self.by_token(tokens.to(torch.promote_types(x.dtype, torch.float32)), own)
            return out.to(x.dtype).view(*x.shape[:-1], self.d_out)
        weights = weights.reshape(by_row[0] if by_row else 1, *weights.shape[len(by_row) :])
        first, row = _distinct(weights, condition)
        down, up = self._built(weights[first])
        down, up = down.to(x.dtype), up.to(x.dtype)
        if len(down) == 1:
            return x @ down[0].T @ up[0]
        if row is not None:
            down, up = down[row], up[row]
        rows = x.reshape(len(x), x.shape[1:-1].numel(), self.d_in)
        return (rows @ down.transpose(1, 2) @ up).view(*x.shape[:-1], self.d_out)

    def _built(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(weights.device.type, enabled=False):
            return self.factors(weights)

    def weights(self, routing: Routing, axes: int) -> Float[Tensor, "*decision experts"]:
        """Weights with an axis for each leading axis of an input of `axes` axes, and for positions where there are any.

        Raises ValueError for weights that these experts can't follow.
        """
        dense = routing.dense()
        leading = axes - 1
        by_position = dense.dim() - 1 == leading + 1
        if not by_position:
            if dense.dim() - 1 > leading:
                raise ValueError(
                    f"routing weights have shape {tuple(dense.shape)}, too many axes for an input of {axes}; expected "
                    f"(experts,), {leading} leading axes and the experts, or one axis of positions between them."
                )
            dense = dense.view(*[1] * (leading + 1 - dense.dim()), *dense.shape)
        if self.positions is None:
            if by_position and dense.shape[-2] > 1:
                raise ValueError(
                    f"the routing chooses at {dense.shape[-2]} positions, but these experts take one choice for the "
                    "layer; use a router without positions, or experts with order positions or heads."
                )
            return dense.squeeze(-2) if by_position else dense
        if not by_position:
            dense = dense.unsqueeze(-2)
        if dense.shape[-2] not in (1, self.positions):
            raise ValueError(
                f"the routing chooses at {dense.shape[-2]} positions, but these experts have {self.positions}; use a "
                "router with as many."
            )
        return dense.expand(*dense.shape[:-2], self.positions, dense.shape[-1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AbstractFactored":
        """As nn.Module's, but a cast to a type narrower than float32 moves the leaves without rounding them."""
        self._kept.forget()

        def wide(tensor: Tensor) -> Tensor:
            made = fn(tensor)
            narrow = tensor.is_floating_point() and made.dtype.itemsize < min(4, tensor.dtype.itemsize)
            return tensor.to(made.device) if narrow else made

        super()._apply(wide, recurse)
        return self

    def train(self, mode: bool = True) -> "AbstractFactored":
        """As nn.Module's; what was kept is forgotten."""
        self._kept.forget()
        super().train(mode)
        return self

    def forget(self) -> None:
        """Forget the factors that are kept, as after a write through `.data`."""
        self._kept.forget()


def _distinct(weights: Tensor, condition: Condition) -> tuple[Any, Tensor | None]:
    """The first row of each distinct choice, and which choice each row has; `slice(None), None` if all are distinct."""
    ids = condition.task_ids
    if ids is None or len(weights) < 2 or len(ids) != len(weights):
        return slice(None), None
    _, row = torch.unique(ids, return_inverse=True)
    count = int(row.max()) + 1
    if count == len(weights):
        return slice(None), None
    first = torch.full((count,), len(row), device=row.device).scatter_reduce(
        0, row, torch.arange(len(row), device=row.device), "amin"
    )
    with torch.no_grad():
        same = torch.equal(weights[first][row], weights)
    return (first, row) if same else (slice(None), None)
