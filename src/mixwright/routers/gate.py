"""Gates of PHATGOOSE (Muqeeth et al. 2024): trained as a sigmoid for one expert, used as a prototype among many."""

from collections.abc import Callable
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from mixwright.ops.standardise import standardise
from mixwright.routers.base import AbstractRouter, AbstractScores
from mixwright.routers.remembered import Remembered
from mixwright.routing import Condition, Routing


class SigmoidGate(AbstractRouter):
    """w_t = sigmoid(v . u_t) for a single expert (Muqeeth et al. 2024, section 3, eq. 2); v starts at zero."""

    def __init__(self, d_in: int) -> None:
        super().__init__()
        self.num_experts = 1
        self.gate = nn.Parameter(torch.zeros(1, d_in))

    def forward(self, x: Float[Tensor, "*batch d_in"], condition: Condition) -> Routing:
        """One weight in (0, 1) for each token, computed in float32 under autocast too."""
        del condition
        with torch.autocast(x.device.type, enabled=False):
            return Routing(torch.sigmoid(linear(x.float(), self.gate.float())), num_experts=1)


def prototype_rows(*prototypes: Float[Tensor, "_ d_in"]) -> Float[Tensor, "rows d_in"]:
    """standardise(v_z) / sqrt(n) for all prototypes given, one below the other.

    Rows of zeros fill up to a multiple of eight: the products of 166 rows took 2.3 ms, of 168 rows 1.9 ms (512 x 2048).
    """
    rows = standardise(torch.cat(prototypes)) * prototypes[0].shape[-1] ** -0.5
    return pad(rows, (0, 0, 0, -len(rows) % 8))


class Sharing(Protocol):
    """Computes the scores of sites that read one tensor together; see `routers/shared.py`."""

    def scores(self, member: "PrototypeScores", x: Tensor) -> Tensor | None:
        """The scores of one member for `x`, or None where they have to be computed alone."""
        ...


class PrototypeScores(AbstractScores):
    """score_z = standardise(v_z) . standardise(u) / sqrt(n) (Muqeeth et al. 2024, section 3, eqs. 3-5).

    `prototypes` are the raw gates and are what is saved; their standardised rows are remembered until the gates change.
    The gates stay as wide as they came in, at least float32, when the model around them is cast to something narrower.
    """

    def __init__(self, prototypes: Float[Tensor, "experts d_in"]) -> None:
        super().__init__()
        self.num_experts = prototypes.shape[0]
        wide = prototypes.detach() if prototypes.dtype == torch.float64 else prototypes.detach().float()
        self.register_buffer("prototypes", wide)
        self.prototypes: Tensor
        self.group: Sharing | None = None
        self._rows = Remembered(prototype_rows)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch experts"]:
        """A centred cosine times sqrt(n), for each expert."""
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self._scores(x)
        return self._scores(x)

    def _scores(self, x: Tensor) -> Tensor:
        shared = None if self.group is None else self.group.scores(self, x)
        if shared is not None:
            return shared
        inputs = standardise(x)
        return linear(inputs, self._rows(self.prototypes, dtype=inputs.dtype))[..., : self.num_experts]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PrototypeScores":
        """As nn.Module's, but a cast to a narrower type moves the gates without rounding them."""
        wide = self.prototypes
        super()._apply(fn, recurse)
        if self.prototypes.dtype.itemsize < wide.dtype.itemsize:
            self.prototypes = wide.to(self.prototypes.device)
        return self
