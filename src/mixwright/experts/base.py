"""What every kind of experts promises."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

from jaxtyping import Float
from torch import Tensor, nn

from mixwright.ops.interpolate import added
from mixwright.routing import Condition, Routing


class AbstractExperts(nn.Module, ABC):
    """Experts that combine outputs: y = sum_e w_e f_e(x).

    Parameters carry the expert axis first. `num_experts` counts the pool; expert ids are the pool's everywhere.
    """

    num_experts: int

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "*batch d_in"], routing: Routing, condition: Condition
    ) -> Float[Tensor, "*batch d_out"]:
        """The experts' combined output for `x`."""

    def sole(self, routing: Routing) -> int | None:
        """The expert that is the whole output under `routing`, of kinds that then hand it over as it is."""
        del routing

    def direct(self, routing: Routing) -> Callable[[Tensor], Tensor] | None:
        """What a call under `routing` comes to, of kinds that need no condition: for a pass without gradients."""
        del routing

    def onto(
        self,
        base: Float[Tensor, "*batch d_out"],
        x: Float[Tensor, "*batch d_in"],
        routing: Routing,
        condition: Condition,
    ) -> Float[Tensor, "*batch d_out"]:
        """`base` plus the experts' output. Kinds that can add in place do so: `base` must be nobody else's."""
        return base + self(x, routing, condition).to(base.dtype)


class AbstractDeltas(nn.Module, ABC):
    """Experts that combine parameters: theta + sum_e w_e delta_e. `names`: of the parameters that may change.

    `frozen` (experts,): those that stay as they are through training.
    """

    num_experts: int
    names: tuple[str, ...]
    frozen: Tensor
    blocks: tuple[str, ...] = ()
    """Parts of the base that may each have a mixture of their own; none: one mixture holds for all of it."""

    @abstractmethod
    def forward(self, routing: Routing) -> dict[str, Tensor]:
        """The change of each named parameter of the base."""

    def onto(self, base: Mapping[str, Tensor], routing: Routing, strength: float = 1.0) -> dict[str, Tensor]:
        """theta + strength * change, of the parameters that change: theta's dtype, and its bits where change is 0."""
        return {name: added(base[name], change, strength) for name, change in self(routing).items()}

    def onto_each(
        self, base: Mapping[str, Tensor], routings: Sequence[Routing], strength: float = 1.0
    ) -> list[dict[str, Tensor]]:
        """`onto` under each of several routings. Kinds for which that shares work do it at once."""
        return [self.onto(base, routing, strength) for routing in routings]

    @abstractmethod
    def norms(self) -> Float[Tensor, " experts"]:
        """How far each expert alone, at weight 1, moves the parameters: |delta_e|."""

    @abstractmethod
    def sparsity(self) -> Float[Tensor, " experts"]:
        """The share of all weights that each expert leaves as they are, counted."""

    @abstractmethod
    def freeze(self, expert: int, frozen: bool = True) -> None:
        """Keep an expert through training as it is now, or let it learn again."""

    def by_block(self, weights: Float[Tensor, " *blocks experts"]) -> Float[Tensor, "rows experts"]:
        """A mixture for each block, one row where there are none; one mixture for all is repeated.

        Raises ValueError for another shape.
        """
        rows = max(1, len(self.blocks))
        alike, apart = (self.num_experts,), (rows, self.num_experts)
        if weights.shape != alike and not (self.blocks and weights.shape == apart):
            expected = f"{alike} or, one for each block, {apart}" if self.blocks else f"{alike}"
            raise ValueError(f"a routing of {tuple(weights.shape)}; expected {expected}.")
        return weights.expand(apart)

    def mean_over_blocks(self, values: Float[Tensor, "*some rows experts"]) -> Float[Tensor, "*some experts"]:
        """Of what `by_block` gives, or what is made from it: blocks count by the weights that they hold."""
        return values.squeeze(-2)


def key_of(name: str) -> str:
    """A parameter's name as a key of `nn.ParameterDict`, which takes no dots."""
    return name.replace(".", "/")
