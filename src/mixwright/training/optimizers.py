"""Optimisers by name, built from a stage's groups."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mixwright.training.stage import Stage


def make_optimizers(
    model: nn.Module, stage: Stage, chosen: Sequence[Mapping[str, nn.Parameter]]
) -> list[torch.optim.Optimizer]:
    """AdamW (betas 0.9 and 0.999, eps 1e-8) over everything, or Muon over hidden matrices and AdamW over the rest.

    Each group keeps its full rate as `peak`, which the loop scales. Muon's updates are scaled to AdamW's size, so that
    one learning rate serves both (Liu et al. 2025, `match_rms_adamw`).
    """
    matrices = _hidden_matrices(model) if stage.optimizer == "muon" else set[int]()
    adamw = _groups(stage, chosen, matrices, keep=False)
    muon = _groups(stage, chosen, matrices, keep=True)
    optimizers: list[torch.optim.Optimizer] = []
    if adamw:
        optimizers.append(torch.optim.AdamW(adamw, lr=0.0, weight_decay=stage.weight_decay))
    if muon:
        adjust: Literal["match_rms_adamw"] = "match_rms_adamw"
        optimizers.append(torch.optim.Muon(muon, lr=0.0, weight_decay=stage.weight_decay, adjust_lr_fn=adjust))
    return optimizers


def set_rate(optimizers: Sequence[torch.optim.Optimizer], rate: float) -> None:
    """Every group's learning rate is its peak times `rate`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate


def optimizer_state(optimizers: Sequence[torch.optim.Optimizer]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by `<optimiser>.<parameter>.<name>`, and plain values by the same keys."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for number, optimizer in enumerate(optimizers):
        for parameter, entries in optimizer.state_dict()["state"].items():
            for name, value in entries.items():
                home = tensors if isinstance(value, Tensor) else values
                home[f"{number}.{parameter}.{name}"] = value
    return tensors, values


def load_optimizer_state(
    optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Put back what `optimizer_state` took."""
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Any]] = {}
        for key, value in {**tensors, **values}.items():
            owner, parameter, name = key.split(".", 2)
            if int(owner) == number:
                state.setdefault(int(parameter), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _groups(
    stage: Stage, chosen: Sequence[Mapping[str, nn.Parameter]], matrices: set[int], *, keep: bool
) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = []
    for group, parameters in zip(stage.groups, chosen, strict=True):
        members = [parameter for parameter in parameters.values() if (id(parameter) in matrices) == keep]
        if members:
            groups.append({"params": members, "peak": group.lr})
    return groups


def _hidden_matrices(model: nn.Module) -> set[int]:
    """Matrices between the layers: neither an embedding, nor the head that reads out of the last one."""
    outer = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    outer |= {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set[int]()
    return {id(p) for p in model.parameters() if p.dim() == 2 and id(p) not in outer}
