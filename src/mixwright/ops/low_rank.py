"""Linear algebra of matrices that are small in the middle: nothing of size (d_out, d_in) is ever formed."""

import torch
from jaxtyping import Float
from torch import Tensor


def product_svd(
    up: Float[Tensor, "d_out rank"], down: Float[Tensor, "rank d_in"]
) -> tuple[Float[Tensor, " rank"], Float[Tensor, "rank d_in"]]:
    """S and V^T of the thin SVD of `up @ down`, singular values descending, by a QR of each factor; float64 inside.

    With up = Q_u R_u and down^T = Q_d R_d, the SVD of R_u R_d^T (rank x rank) is turned by Q_d. A row of V^T that
    belongs to a singular value of zero is arbitrary; where rank exceeds d_in or d_out, S and V^T are filled up with 0.
    """
    rank = down.shape[0]
    inner_up = torch.linalg.qr(up.double(), mode="r").R
    basis, inner_down = torch.linalg.qr(down.double().T)
    _, singular, right = torch.linalg.svd(inner_up @ inner_down.T, full_matrices=False)
    right = right @ basis.T
    missing = rank - len(singular)
    singular = torch.nn.functional.pad(singular, (0, missing))
    right = torch.nn.functional.pad(right, (0, 0, 0, missing))
    return singular.float(), right.float()


def solve_shifted(
    diagonal: Float[Tensor, " d_in"], factor: Float[Tensor, "rank d_in"] | None, rows: Float[Tensor, "*batch d_in"]
) -> Float[Tensor, "*batch d_in"]:
    """rows (diag(diagonal) + factor^T factor)^-1, by the Woodbury identity; with `factor` None, a division.

    D^-1 - D^-1 F^T (I + F D^-1 F^T)^-1 F D^-1. Its system has `rank` unknowns; a factor of more than d_in rows is
    reduced to the d_in rows of its QR first.
    """
    scaled = rows / diagonal
    if factor is None:
        return scaled
    small: Tensor = torch.linalg.qr(factor, mode="r").R if factor.shape[0] > factor.shape[1] else factor
    weighted = small / diagonal
    core = torch.eye(len(small), dtype=small.dtype, device=small.device) + weighted @ small.T
    return scaled - (rows @ weighted.T) @ torch.linalg.solve(core, weighted)
