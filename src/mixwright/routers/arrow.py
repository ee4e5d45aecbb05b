"""Arrow: a gate for every adapter that has none, read off the adapter itself."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from mixwright.ops.low_rank import product_svd
from mixwright.routers.base import AbstractScores


class ArrowScores(AbstractScores):
    """score_e = |v_e . u|, v_e the first right singular vector of s_e B_e A_e (Ostapenko et al. 2024, section 4.1).

    v_e is the unit direction of the input which the adapter amplifies most. Its sign is arbitrary, hence the absolute
    value; the raw u is scored, without a temperature. Released variants divide by 10 or by 10 sqrt(n), which changes
    the weights of the winners but never who wins.
    """

    def __init__(self, directions: Float[Tensor, "experts d_in"]) -> None:
        super().__init__()
        self.num_experts = directions.shape[0]
        self.register_buffer("directions", directions.detach().float())
        self.directions: Tensor

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch experts"]:
        """How far each token reaches along each expert's direction."""
        with torch.autocast(x.device.type, enabled=False):
            return linear(x.float(), self.directions).abs()

    @classmethod
    def from_lora(cls, factors: Sequence[tuple[Tensor, Tensor, float] | None]) -> "ArrowScores":
        """From `(down (rank, d_in), up (d_out, rank), scale)` of each expert; None, for one that does not adapt the
        site, scores 0 and has to be masked by the router."""
        return cls(torch.stack([rows[0] for rows in right_vectors(factors, weighted=False)]))


def right_vectors(
    factors: Sequence[tuple[Tensor, Tensor, float] | None], *, weighted: bool
) -> list[Float[Tensor, "rank d_in"]]:
    """V^T of each expert's s B A, strongest row first, or S V^T if `weighted`; all padded with zeros to one rank."""
    present = [entry for entry in factors if entry is not None]
    if not present:
        raise ValueError("no expert of the pool adapts this site.")
    rank, d_in = max(down.shape[0] for down, _, _ in present), present[0][0].shape[1]
    found: list[Tensor] = []
    for entry in factors:
        rows = present[0][0].new_zeros((rank, d_in), dtype=torch.float32)
        if entry is not None:
            down, up, scale = entry
            singular, right = product_svd(up.detach() * scale, down.detach())
            rows[: len(right)] = singular[:, None] * right if weighted else right
        found.append(rows)
    return found
