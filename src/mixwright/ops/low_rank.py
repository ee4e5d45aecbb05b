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
    if x.dtype != down.dtype:
        x = x.to(down.dtype)
    if row is not None:
        down, up = down[row], up[row]
    in_place = onto is not None and not torch.is_grad_enabled()
    if x.dim() == 3 and len(x) == len(down):
        rows, target = x, onto
    else:
        shape = (len(down), x.shape[:-1].numel() // max(1, len(down)))
        rows = x.reshape(*shape, x.shape[-1])
        target = None if onto is None else onto.reshape(*shape, up.shape[2])
    hidden = torch.bmm(rows, down.transpose(1, 2))
    if onto is None or target is None:
        return torch.bmm(hidden * scale, up).view(*x.shape[:-1], up.shape[2])
    add = torch.Tensor.baddbmm_ if in_place else torch.baddbmm
    out = add(target, hidden, up, alpha=scale)
    return out if target is onto else out.view(onto.shape)


def low_rank_mixed(
    x: Float[Tensor, "tokens d_in"],
    down: Float[Tensor, "experts rank d_in"],
    up: Float[Tensor, "experts rank d_out"],
    weights: Float[Tensor, "tokens experts"],
) -> Float[Tensor, "tokens d_out"]:
    """(x sum_s w_s A_s) sum_s w_s B_s with weights of its own for every token, as two products over all experts."""
    hidden = torch.einsum("ti,sri->tsr", x, down)
    hidden = torch.einsum("tsr,ts->tr", hidden, weights)
    return torch.einsum("tsr,sro->to", hidden[:, None] * weights[..., None], up)


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
