"""What training will need, before it is begun."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from mixwright.data.batches import Batches
from mixwright.data.collate import Batch
from mixwright.data.episodes import Episode
from mixwright.training.gradients import row_parameters, tables_of
from mixwright.training.stage import Stage, select_parameters


def trainable_counts(model: nn.Module, stage: Stage) -> list[int]:
    """Numbers that each group of a stage trains."""
    return [sum(p.numel() for p in group.values()) for group in select_parameters(model, stage.groups)]


def estimate_bytes(model: nn.Module, stage: Stage, data: Batches) -> dict[str, int]:
    """Bytes of `weights`, `gradients and optimiser` and `activations`, for one process.

    The first two are counted, but for gradients of retrieved rows alone. Activations are what one forward pass over one
    example keeps for its backward pass, times the batch size: measured, but on one example, and without the temporaries
    of a layer.
    """
    weights = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    return {
        "weights": weights,
        "gradients and optimiser": sum(_learning(model, stage)),
        "activations": _kept(model, stage, data) * data.batch_size,
    }


def _learning(model: nn.Module, stage: Stage) -> Iterator[int]:
    """For each parameter, the bytes of its gradient and of what its optimiser keeps; compact gradients are left out."""
    tables = row_parameters(tables_of(model))
    for group, parameters in zip(stage.groups, select_parameters(model, stage.groups), strict=True):
        for parameter in parameters.values():
            if parameter not in tables or group.optimizer == "adamw":
                yield 3 * 4 * parameter.numel()
            elif group.optimizer == "lazy_adamw":
                yield 2 * 4 * parameter.numel() + 4 * len(parameter)
            else:
                yield 4 * parameter.shape[:2].numel() + 4 * len(parameter)


def _kept(model: nn.Module, stage: Stage, data: Batches) -> int:
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    def same(tensor: Any) -> Any:
        return tensor

    device = next(model.parameters()).device
    batch: object = data.collate(data.examples[:1]).to(device)
    wanted: Mapping[nn.Parameter, bool] = {p: p.requires_grad for p in model.parameters()}
    trained = {p for group in select_parameters(model, stage.groups) for p in group.values()}
    if not trained:
        return 0
    modes = {module: module.training for module in model.modules()}
    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    try:
        for parameter in wanted:
            parameter.requires_grad_(parameter in trained)
        if isinstance(batch, Episode):  # whose loss keeps nothing in evaluation
            model.train()
        with torch.autograd.graph.saved_tensors_hooks(note, same):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
                stage.objective(model, cast(Batch, batch))
    finally:
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode
    return sum(seen.values())
