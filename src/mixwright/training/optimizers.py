"""Optimisers by name, built from a stage's groups."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mixwright.training.dual_ascent import DualAscent
from mixwright.training.exponentiated_gradient import ExponentiatedGradient, plain_rows
from mixwright.training.gradients import row_parameters, tables_of
from mixwright.training.row_optimizer import AbstractRowOptimizer
from mixwright.training.row_optimizers import LazyAdamW, RowwiseAdagrad
from mixwright.training.stage import ParamGroup, Stage


def make_optimizers(
    model: nn.Module, stage: Stage, chosen: Sequence[Mapping[str, nn.Parameter]], seed: int = 0
) -> list[torch.optim.Optimizer]:
    """AdamW (betas 0.9 and 0.999, eps 1e-8) over everything, or Muon over hidden matrices and AdamW over the rest.

    Groups that name an optimiser of their own have it. Each group keeps its full rate as `peak`, which the loop scales.
    Muon's updates are scaled to AdamW's size, so that one learning rate serves both (Liu et al. 2025,
    `match_rms_adamw`).
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
    optimizers += _row_optimizers(model, stage, chosen, seed) + _simplex_optimizers(model, stage, chosen)
    return optimizers + _plain_optimizers(stage, chosen)


def set_rate(optimizers: Sequence[torch.optim.Optimizer], rate: float, progress: float = 0.0) -> None:
    """Every group's learning rate is its peak times `rate`, times what `progress` through the stage leaves of it."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate * (1 + (group["end"] - 1) * progress)


def optimizer_state(optimizers: Sequence[torch.optim.Optimizer]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by `<optimiser>.<parameter>.<name>`, and plain values by the same keys. Lagging rows go on lagging."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for number, optimizer in enumerate(optimizers):
        lazy = isinstance(optimizer, AbstractRowOptimizer)
        taken = optimizer.state_dict(flush=False) if lazy else optimizer.state_dict()
        for parameter, entries in taken["state"].items():
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
        lazy = isinstance(optimizer, AbstractRowOptimizer)
        own = optimizer.state_dict(flush=False) if lazy else optimizer.state_dict()
        optimizer.load_state_dict({"state": state, "param_groups": own["param_groups"]})


def _groups(
    stage: Stage, chosen: Sequence[Mapping[str, nn.Parameter]], matrices: set[int], *, keep: bool
) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = []
    for group, parameters in zip(stage.groups, chosen, strict=True):
        members = [parameter for parameter in parameters.values() if (id(parameter) in matrices) == keep]
        if members and group.optimizer == "adamw":
            groups.append({"params": members, **_rates(stage, group)})
    return groups


def _rates(stage: Stage, group: ParamGroup) -> dict[str, float]:
    decay = stage.weight_decay if group.weight_decay is None else group.weight_decay
    return {"peak": group.lr, "end": group.lr_end, "weight_decay": decay}


def _simplex_optimizers(
    model: nn.Module, stage: Stage, chosen: Sequence[Mapping[str, nn.Parameter]]
) -> list[torch.optim.Optimizer]:
    """One for all groups that ask for it. Raises ValueError for what is no row of mixture weights, or is drawn."""
    groups = [(g, m) for g, m in zip(stage.groups, chosen, strict=True) if g.optimizer == "exponentiated_gradient"]
    if not groups:
        return []
    rows = plain_rows(model)
    for name, parameter in ((n, p) for _, members in groups for n, p in members.items()):
        if parameter not in rows or rows[parameter].draw != "none":
            raise ValueError(
                f"stage {stage.name}: {name} can't have optimizer=exponentiated_gradient, which learns the logits of "
                "mixture weights that are neither drawn nor depend on the input; give its group adamw."
            )
    entries = [{"params": list(m.values()), "lr": 0.0, "peak": g.lr, "end": g.lr_end} for g, m in groups]
    return [ExponentiatedGradient(entries, rows)]


def _plain_optimizers(stage: Stage, chosen: Sequence[Mapping[str, nn.Parameter]]) -> list[torch.optim.Optimizer]:
    """SGD for all groups that ask for it, dual ascent for those that do."""
    groups = [(g, list(m.values())) for g, m in zip(stage.groups, chosen, strict=True)]
    sgd = [{"params": m, "momentum": g.momentum, **_rates(stage, g)} for g, m in groups if g.optimizer == "sgd"]
    dual = [{"params": m, "peak": g.lr, "end": g.lr_end} for g, m in groups if g.optimizer == "dual_ascent"]
    made: list[torch.optim.Optimizer] = [torch.optim.SGD(sgd, lr=0.0)] if sgd else []
    return [*made, DualAscent(dual)] if dual else made


def _row_optimizers(
    model: nn.Module, stage: Stage, chosen: Sequence[Mapping[str, nn.Parameter]], seed: int
) -> list[torch.optim.Optimizer]:
    """One for all groups of either kind. Raises ValueError for frozen rows that a dense optimiser would move."""
    tables = tables_of(model)
    groups: dict[str, list[dict[str, Any]]] = {"lazy_adamw": [], "rowwise_adagrad": [], "adamw": []}
    for group, members in zip(stage.groups, chosen, strict=True):
        entry = {"params": list(members.values()), "lr": 0.0, **_rates(stage, group)}
        groups.setdefault(group.optimizer, []).append(entry)
    held = row_parameters(table for table in tables if table.frozen is not None and bool(table.frozen.any()))
    dense = [(g, m) for g, m in zip(stage.groups, chosen, strict=True) if g.optimizer in ("adamw", "sgd")]
    for by, name, parameter in ((g.optimizer, n, p) for g, m in dense for n, p in m.items()):
        if parameter in held:
            raise ValueError(
                f"stage {stage.name}: {name} has frozen rows, which {by} would move by its weight decay and momentum; "
                "give its group optimizer=lazy_adamw or rowwise_adagrad."
            )
    made: list[torch.optim.Optimizer] = []
    if groups["lazy_adamw"]:
        made.append(LazyAdamW(groups["lazy_adamw"], weight_decay=stage.weight_decay, tables=tables, seed=seed))
    if groups["rowwise_adagrad"]:
        made.append(
            RowwiseAdagrad(groups["rowwise_adagrad"], weight_decay=stage.weight_decay, tables=tables, seed=seed)
        )
    return made


def _hidden_matrices(model: nn.Module) -> set[int]:
    """Matrices between the layers: neither an embedding, nor the head that reads out of the last one."""
    outer = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    outer |= {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set[int]()
    return {id(p) for p in model.parameters() if p.dim() == 2 and id(p) not in outer}
