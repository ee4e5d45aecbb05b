"""SpectR: the whole spectrum of an adapter as its gate."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mixwright.routers.arrow import right_vectors
from mixwright.routers.base import AbstractScores


class SpectralScores(AbstractScores):
    """score_e = ||M_e u||, M_e = S_e V_e^T of the SVD U S V^T = s_e B_e A_e (Fleshman and Van Durme 2025, section 3).

    Since U has orthonormal columns, that is ||s_e B_e A_e u||, the length of what the expert would add. The paper
    stores B* = U S and A* = V^T; `from_lora` weighs the directions by S, `from_subspace` is the other reading, with
    M_e = V_e^T: how much of u lies in the adapter's input space, whatever the adapter does with it.
    """

    def __init__(self, maps: Float[Tensor, "experts rank d_in"]) -> None:
        super().__init__()
        self.num_experts = maps.shape[0]
        self.register_buffer("maps", maps.detach().float())
        self.maps: Tensor

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch experts"]:
        """The length of each token's image under each expert's map."""
        with torch.autocast(x.device.type, enabled=False):
            return torch.linalg.vector_norm(torch.einsum("...i,eri->...er", x.float(), self.maps), dim=-1)

    @classmethod
    def from_lora(cls, factors: Sequence[tuple[Tensor, Tensor, float] | None]) -> "SpectralScores":
        """M_e = S_e V_e^T, from `(down, up, scale)` of each expert; None scores 0 and has to be masked."""
        return cls(torch.stack(right_vectors(factors, weighted=True)))

    @classmethod
    def from_subspace(cls, factors: Sequence[tuple[Tensor, Tensor, float] | None]) -> "SpectralScores":
        """M_e = V_e^T, from the same. Directions with a singular value of zero are left out."""
        weighted = torch.stack(right_vectors(factors, weighted=True))
        length = torch.linalg.vector_norm(weighted, dim=-1, keepdim=True)
        dead = length <= 1e-6 * length.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return cls(torch.where(dead, 0.0, torch.stack(right_vectors(factors, weighted=False))))
