"""Gradients summed over the processes of a run: dense ones in one message, of compact ones the rows anybody has."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mixwright.experts.table import NeuronTable
from mixwright.ops.exchange import group_tokens
from mixwright.training.gradients import compact_gradient, touched_rows
from mixwright.training.row_optimizer import AbstractRowOptimizer


def sum_gradients(
    parameters: Iterable[nn.Parameter], tables: Mapping[nn.Parameter, NeuronTable], accelerator: Accelerator
) -> None:
    """Every process has the sum of all gradients afterwards, the same to the bit. Compact ones are settled before."""
    dense: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter in tables and not _dense_somewhere(parameter, accelerator):
            parameter.grad = _sum_rows(parameter)
        else:
            parameter.grad = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
            dense.append(parameter.grad)
    if dense:
        flat: Any = accelerator.reduce(torch.cat([gradient.flatten() for gradient in dense]), "sum")
        for gradient, part in zip(dense, flat.split([g.numel() for g in dense]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _dense_somewhere(parameter: nn.Parameter, accelerator: Accelerator) -> bool:
    """Whether a process has a dense gradient, or half of the rows are touched by all of them together."""
    gradient = cast(Tensor, parameter.grad)
    own = gradient._nnz() if gradient.is_sparse else len(parameter)
    touched: Any = accelerator.reduce(torch.tensor(own, device=gradient.device), "sum")
    return 2 * int(touched) >= len(parameter)


def _sum_rows(parameter: nn.Parameter) -> Tensor:
    ids, values = touched_rows(cast(Tensor, parameter.grad))
    assert ids is not None
    rows = group_tokens(len(ids), None, ids.device)
    both = compact_gradient(rows.all(ids), rows.all(values), parameter.shape, unique=False)
    return both.coalesce()


def share_reads(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Rows that one process read and caught up are caught up on all: tables stay the same to the bit."""
    for optimizer in optimizers:
        if isinstance(optimizer, AbstractRowOptimizer) and optimizer.reads is not None:
            for parameter, read in optimizer.reads.items():
                own = torch.cat(read) if read else torch.empty(0, dtype=torch.int64, device=parameter.device)
                optimizer.catch_up(parameter, group_tokens(len(own), None, own.device).all(own))
                read.clear()
