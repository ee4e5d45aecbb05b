"""Gradients of tables: dense, or the rows that were retrieved alone. What all of them have in common with dense ones.

A compact gradient is a sparse COO tensor over rows. Where several passes add up it names a row more than once, and its
norm is that of the sums, so it is made unique before anything else looks at it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mixwright.experts.table import NeuronTable


def tables_of(module: nn.Module) -> list[NeuronTable]:
    """Every table of neurons within, once."""
    return [part for part in module.modules() if isinstance(part, NeuronTable)]


def row_parameters(tables: Iterable[NeuronTable]) -> dict[nn.Parameter, NeuronTable]:
    """Parameters with a row for each expert, and the table of each."""
    return {p: table for table in tables for p in (table.rows, table.bias) if p is not None}


def touched_rows(gradient: Tensor) -> tuple[Tensor | None, Tensor]:
    """Ids of rows, unique and ascending, and their gradients; None and the gradient itself where it is dense."""
    if not gradient.is_sparse:
        return None, gradient
    if gradient.sparse_dim() != 1:
        raise ValueError(
            f"a gradient of shape {tuple(gradient.shape)} is sparse in {gradient.sparse_dim()} dimensions; "
            "rows of a table are sparse in the first one only."
        )
    ids = gradient._indices()[0]
    if not gradient.is_coalesced() and not bool((ids[1:] > ids[:-1]).all()):
        gradient = gradient.coalesce()
        ids = gradient._indices()[0]
    return ids, gradient._values()


def compact_gradient(ids: Tensor, values: Tensor, shape: torch.Size, *, unique: bool = True) -> Tensor:
    """The sparse gradient of these rows; `unique`: each is named once, in ascending order."""
    return torch.sparse_coo_tensor(ids[None], values, shape, is_coalesced=unique, check_invariants=False)


def no_rows(parameter: nn.Parameter) -> Tensor:
    """The compact gradient that names no row."""
    ids = torch.empty(0, dtype=torch.int64, device=parameter.device)
    return compact_gradient(ids, parameter.new_empty((0, *parameter.shape[1:])), parameter.shape)


def settle(parameter: nn.Parameter, frozen: Tensor | None = None) -> None:
    """Name each row of a compact gradient once, and forget the gradients of frozen rows."""
    if parameter.grad is None:
        return
    ids, values = touched_rows(parameter.grad)
    if ids is None:
        if frozen is not None:
            values[frozen] = 0
        return
    if frozen is not None:
        free = ~frozen[ids]
        ids, values = ids[free], values[free]
    parameter.grad = compact_gradient(ids, values, parameter.shape)


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_`, for settled compact gradients as well: the norm before, over all parameters."""
    with_gradient = [p for p in parameters if p.grad is not None]
    if not any(p.grad.is_sparse for p in with_gradient if p.grad is not None):
        return nn.utils.clip_grad_norm_(with_gradient, limit)
    values = [touched_rows(p.grad)[1] for p in with_gradient if p.grad is not None]
    norm = nn.utils.get_total_norm(values)
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for value in values:
        value.mul_(factor.to(value.device))
    return norm
