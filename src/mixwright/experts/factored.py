"""Experts that combine factors: a low-rank change is built for each choice, and then it is a plain LoRA."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from mixwright.experts.base import AbstractExperts
from mixwright.experts.factor_cache import FactorCache
from mixwright.ops.low_rank import low_rank
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

    @abstractmethod
    def leaves(self) -> tuple[Tensor, ...]:
        """Every parameter that factors are built from, in one order."""

    def forward(
        self, x: Float[Tensor, "*batch d_in"], routing: Routing, condition: Condition
    ) -> Float[Tensor, "*batch d_out"]:
        """(1/rank) (x A_w) B_w."""
        built = self._built(x, routing, condition)
        return self._by_token(x, routing) if built is None else low_rank(x, *built, scale=1 / self.rank)

    def onto(
        self,
        base: Float[Tensor, "*batch d_out"],
        x: Float[Tensor, "*batch d_in"],
        routing: Routing,
        condition: Condition,
    ) -> Float[Tensor, "*batch d_out"]:
        """The same added to `base`, in its memory where no gradient is recorded."""
        built = self._built(x, routing, condition)
        if built is None or built[0].dtype != base.dtype:
            out = self._by_token(x, routing) if built is None else low_rank(x, *built, scale=1 / self.rank)
            return base + out.to(base.dtype)
        return low_rank(x, *built, scale=1 / self.rank, onto=base)

    def _by_token(self, x: Tensor, routing: Routing) -> Tensor:
        weights = self.weights(routing, x.dim())
        own = weights.expand(*x.shape[:-1], *weights.shape[x.dim() - 1 :]).flatten(0, x.dim() - 2)
        wide = torch.promote_types(x.dtype, torch.float32)
        with _as_it_is(x):
            out = self.by_token(x.reshape(-1, self.d_in).to(wide), own) / self.rank
        return out.to(x.dtype).view(*x.shape[:-1], self.d_out)

    def _built(self, x: Tensor, routing: Routing, condition: Condition) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Factors in the type to compute in, and which of them each row takes; None where every token has its own."""
        dtype = torch.get_autocast_dtype(x.device.type) if _autocasts(x) else x.dtype
        if self.training or torch.compiler.is_compiling() or x.is_meta:
            return self._anew(x, dtype, routing, condition)
        leaves, how = self.leaves(), (x.dim(), dtype)
        if torch.is_grad_enabled() and (routing.weights.requires_grad or any(leaf.requires_grad for leaf in leaves)):
            return self._anew(x, dtype, routing, condition)
        kept = self._kept.latest(routing, how, leaves)
        if kept is not None:
            return kept
        choices = self._by_row(routing, x)
        if choices is None:
            return None
        ids = condition.task_ids
        key = (dtype, None if ids is None else tuple(ids.tolist()))
        kept = self._kept.find(routing, how, key, choices, leaves)
        if kept is None:
            # What is made in inference mode could never again take part in a pass that records gradients.
            with torch.inference_mode(False), torch.no_grad():
                kept = self._anew(x, dtype, routing, condition)
            assert kept is not None
            self._kept.keep(routing, how, key, choices, leaves, kept)
        return kept

    def _anew(
        self, x: Tensor, dtype: torch.dtype, routing: Routing, condition: Condition
    ) -> tuple[Tensor, Tensor, Tensor | None] | None:
        choices = self._by_row(routing, x)
        if choices is None:
            return None
        choices, row = distinct(choices, condition.task_ids)
        with _as_it_is(x):
            down, up = self.factors(choices)
        return (down, up, row) if down.dtype == dtype else (down.to(dtype), up.to(dtype), row)

    def _by_row(self, routing: Routing, x: Tensor) -> Tensor | None:
        """Weights `(batch or 1, [positions,] experts)`, or None if they vary by token."""
        weights = self.weights(routing, x.dim())
        leading = weights.shape[: x.dim() - 1]
        if leading[1:].numel() != 1:
            return None
        if leading and leading[0] not in (1, x.shape[0]):
            raise ValueError(
                f"the routing has {leading[0]} rows for a batch of {x.shape[0]}; give one row of weights for each row "
                "of the batch, or one for all."
            )
        return weights.reshape(leading[0] if leading else 1, *weights.shape[len(leading) :])

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


def widened(leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The same in float32, if they came in a narrower type."""
    return tuple(leaf if leaf.dtype.itemsize >= 4 else leaf.float() for leaf in leaves)


def _autocasts(x: Tensor) -> bool:
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def _as_it_is(x: Tensor) -> AbstractContextManager[object]:
    """Inside, nothing is cast; entering a context that is not needed would take longer than a small layer does."""
    return torch.autocast(x.device.type, enabled=False) if _autocasts(x) else nullcontext()


def distinct(
    weights: Float[Tensor, "batch *positions experts"], task_ids: Tensor | None
) -> tuple[Float[Tensor, "choices *positions experts"], Tensor | None]:
    """The distinct rows of `weights`, and which of them each row is; None where they share the rows out evenly.

    Rows of one task are one choice if their weights are equal, which noise or a router that looks at x prevents.
    """
    if task_ids is None or len(weights) < 2 or len(task_ids) != len(weights):
        return weights, None
    if weights.device.type == "meta" or torch.compiler.is_compiling():
        return weights, None
    firsts: dict[int, int] = {}
    found = [firsts.setdefault(task, place) for place, task in enumerate(task_ids.tolist())]
    if len(firsts) == len(found):
        return weights, None
    if len(firsts) == 1:
        return (weights[:1], None) if torch.equal(weights[:1].expand_as(weights), weights) else (weights, None)
    choice = {place: number for number, place in enumerate(firsts.values())}
    row = torch.tensor([choice[place] for place in found], device=weights.device)
    chosen = weights[torch.tensor(list(choice), device=weights.device)]
    if not torch.equal(chosen[row], weights):
        return weights, None
    share = len(found) // len(choice)
    evenly = [choice[place] for place in found] == [place // share for place in range(len(found))]
    return chosen, None if evenly and share * len(choice) == len(found) else row
