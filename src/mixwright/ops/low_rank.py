"""Linear algebra of matrices that are small in the middle: nothing of size (d_out, d_in) is ever formed."""

import torch
from jaxtyping import Float, Int
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


def low_rank(
    x: Float[Tensor, "*batch d_in"],
    down: Float[Tensor, "choices rank d_in"],
    up: Float[Tensor, "choices rank d_out"],
    row: Int[Tensor, " rows"] | None = None,
    *,
    scale: float = 1.0,
    onto: Float[Tensor, "*batch d_out"] | None = None,
) -> Float[Tensor, "*batch d_out"]:
    """scale (x down^T) up, where row i of x's first axis takes choice `row[i]`.

    Without `row` the choices share the rows out evenly, in their order: one for all, or one for each. `onto` is an
    output to which the result is added; it is overwritten where no gradient is recorded, so hand over only a tensor
    that nobody else holds. Computed in the factors' type, which must be that of `onto`.
    """
    x, d_out = x.to(down.dtype), up.shape[2]
    if len(down) == 1:
        hidden = torch.nn.functional.linear(x, down[0])
        if onto is None:
            return (hidden * scale) @ up[0]
        add = torch.addmm if torch.is_grad_enabled() else torch.Tensor.addmm_
        return add(onto.reshape(-1, d_out), hidden.reshape(-1, hidden.shape[-1]), up[0], alpha=scale).view(onto.shape)
    if row is not None:
        down, up = down[row], up[row]
    shape = (len(down), x.shape[:-1].numel() // max(1, len(down)))
    hidden = torch.bmm(x.reshape(*shape, x.shape[-1]), down.transpose(1, 2))
    if onto is None:
        return torch.bmm(hidden * scale, up).view(*x.shape[:-1], d_out)
    add = torch.baddbmm if torch.is_grad_enabled() else torch.Tensor.baddbmm_
    return add(onto.reshape(*shape, d_out), hidden, up, alpha=scale).view(onto.shape)


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
