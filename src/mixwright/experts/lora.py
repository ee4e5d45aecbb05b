"""LoRA experts (Hu et al. 2021): f_e(x) = s_e B_e A_e x, stacked, of any mix of ranks."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixwright.experts.base import AbstractExperts
from mixwright.ops.dispatch import combine_lora
from mixwright.routing import Condition, Routing


class LoraExperts(AbstractExperts):
    """f_e(x) = scale_e * up_e (down_e x), Hu et al. 2021, eq. 3, for the members of a pool that adapt this site.

    `down` (members, rank, d_in) and `up` (members, d_out, rank) are padded with zeros to the largest rank; `scale`
    (members,) is alpha/r or its like, already divided. `members` are the pool ids of the rows; an expert of the pool
    that is no member here contributes nothing.
    """

    def __init__(
        self,
        down: Float[Tensor, "members rank d_in"],
        up: Float[Tensor, "members d_out rank"],
        scale: Float[Tensor, " members"],
        num_experts: int,
        members: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        ids = list(range(num_experts) if members is None else members)
        if not (len(ids) == down.shape[0] == up.shape[0] == scale.shape[0]):
            held = ", ".join(str(tensor.shape[0]) for tensor in (down, up, scale))
            raise ValueError(
                f"{len(ids)} members, but down, up and scale hold {held}; give one row of each per member."
            )
        self.num_experts = num_experts
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)
        slot = torch.full((num_experts,), -1, dtype=torch.long, device=down.device)
        slot[torch.tensor(ids, dtype=torch.long)] = torch.arange(len(ids), device=down.device)
        self.register_buffer("scale", scale.to(torch.float32))
        self.register_buffer("slot", slot)
        self.scale: Tensor
        self.slot: Tensor
        self.complete = ids == list(range(num_experts))

    @property
    def members(self) -> list[int]:
        """Pool ids of the rows, in the order of the rows."""
        present = (self.slot >= 0).nonzero().squeeze(-1)
        return present[self.slot[present].argsort()].tolist()

    def forward(
        self, x: Float[Tensor, "*batch d_in"], routing: Routing, condition: Condition
    ) -> Float[Tensor, "*batch d_out"]:
        """sum_e w_e s_e B_e A_e x over the members."""
        del condition
        return combine_lora(x, self.down, self.up, self.scale, *self._rows(routing))

    def onto(
        self,
        base: Float[Tensor, "*batch d_out"],
        x: Float[Tensor, "*batch d_in"],
        routing: Routing,
        condition: Condition,
    ) -> Float[Tensor, "*batch d_out"]:
        """The same added to `base`, in its memory where no gradient is recorded."""
        if base.dtype != x.dtype:
            return base + self(x, routing, condition).to(base.dtype)
        return combine_lora(x, self.down, self.up, self.scale, *self._rows(routing), onto=base)

    def _rows(self, routing: Routing) -> tuple[Tensor, Tensor | None]:
        """Weights and rows of the members that act; a weight for one that is no member becomes zero."""
        weights, indices = routing.weights, routing.indices
        if self.complete:
            return weights, indices
        if indices is None:
            return weights[..., self.members], None
        rows = self.slot[indices]
        return weights.masked_fill(rows < 0, 0.0), rows.clamp_min(0)

    @classmethod
    def stack(
        cls, factors: Sequence[tuple[Tensor, Tensor, float] | None], device: torch.device | None = None
    ) -> "LoraExperts":
        """One expert for each entry, `(down (rank, d_in), up (d_out, rank), scale)`; None for one that is no member."""
        members = [i for i, entry in enumerate(factors) if entry is not None]
        present = [entry for entry in factors if entry is not None]
        if not present:
            raise ValueError("no expert of the pool adapts this site.")
        rank = max(down.shape[0] for down, _, _ in present)
        down = torch.stack([nn.functional.pad(a, (0, 0, 0, rank - a.shape[0])) for a, _, _ in present])
        up = torch.stack([nn.functional.pad(b, (0, rank - b.shape[1])) for _, b, _ in present])
        scale = torch.tensor([s for _, _, s in present], dtype=torch.float32)
        return cls(down.to(device), up.to(device), scale.to(device), len(factors), members)
