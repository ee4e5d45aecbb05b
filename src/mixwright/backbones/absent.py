"""Modules that a model no longer has, because nobody reads what they compute: an embedding, a norm, a head.

A component of a discretised hybrid still runs its own forward from token to logits, but only its layers count. What
lies outside them and is not used is replaced by something without numbers that hands on tensors of the right shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mixwright.backbones.eval_mode import eval_mode
from mixwright.backbones.parts import Parts


class Absent(nn.Module):
    """Zeros of `width` channels in place of what ids would give, and hidden states as they come.

    `rows`: of the table that it stands for, which others ask after. `per_token`: ids are tokens, one row each; else
    positions of some kind, and one row of zeros does for all.
    """

    def __init__(self, rows: int, width: int, dtype: torch.dtype, *, per_token: bool) -> None:
        super().__init__()
        self.out_features, self.width, self.dtype, self.per_token = rows, width, dtype, per_token

    @property
    def weight(self) -> Tensor:
        """The shape and the dtype of the table, without values."""
        return torch.empty(self.out_features, self.width, dtype=self.dtype, device="meta")

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Zeros that take no memory, or the hidden state itself where its width does not change."""
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if x.is_floating_point() and x.shape[-1] == self.width:
            return x
        shape = x.shape[:-1] if x.is_floating_point() else x.shape
        dtype = x.dtype if x.is_floating_point() else self.dtype
        lead = tuple(shape) if self.per_token or x.is_floating_point() else (1, 1)
        return torch.zeros((), dtype=dtype, device=x.device).expand(*lead, self.width)


@dataclass(frozen=True, kw_only=True)
class Outside:
    """Paths of the modules that run outside of the layers, in order: `before` the first, `after` the last."""

    before: tuple[str, ...]
    after: tuple[str, ...]
    head: str
    widths: dict[str, int] = field(default_factory=dict[str, int])
    """Channels of what each gives."""

    @property
    def tail(self) -> str:
        """What is entered when the last layer is done: a norm, mostly."""
        return self.after[0] if self.after else self.head


def outside_of(model: nn.Module, parts: Parts) -> Outside:
    """Run `model` once on two tokens and see what is called around its layers."""
    order: list[str] = []
    widths: dict[str, int] = {}
    inside = False
    hooks: list[Any] = []

    def watch(path: str, module: nn.Module) -> None:
        def enter(*_: Any) -> None:
            if not inside and not any(path.startswith(f"{other}.") for other in order):
                order.append(path)

        def leave(_: nn.Module, __: Any, out: Any) -> None:
            if isinstance(out, Tensor) and out.dim():
                widths[path] = out.shape[-1]

        hooks.append(module.register_forward_pre_hook(enter))
        hooks.append(module.register_forward_hook(leave))

    def layer(number: int) -> None:
        def enter(*_: Any) -> None:
            nonlocal inside
            inside = True

        def leave(*_: Any) -> None:
            nonlocal inside
            inside = False
            order.append(f"{parts.layers}.{number}")

        module = parts.layer(model, number)
        hooks.append(module.register_forward_pre_hook(enter))
        hooks.append(module.register_forward_hook(leave))

    for number in range(parts.num_layers):
        layer(number)
    for path, module in model.named_modules():
        around = not path or parts.layers.startswith(f"{path}.") or path == parts.layers
        if not around and not path.startswith(f"{parts.layers}."):
            watch(path, module)
    device = next(model.parameters()).device
    try:
        with eval_mode(model):
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    first, last = order.index(f"{parts.layers}.0"), order.index(f"{parts.layers}.{parts.num_layers - 1}")
    end = order.index(parts.head, last)
    return Outside(before=tuple(order[:first]), after=tuple(order[last + 1 : end]), head=parts.head, widths=widths)


def unused(model: nn.Module, parts: Parts, *, embeds: bool, ends: bool, heads: bool) -> tuple[str, ...]:
    """The modules with numbers of their own that nobody needs, unless a component `embeds` the tokens, `ends` the last
    block (its norm is then read), and `heads`, that is, gives the logits."""
    seen = outside_of(model, parts)
    chosen = [*(() if embeds else seen.before), *(() if ends else seen.after), *(() if heads else (seen.head,))]
    twice = set(seen.before) & {*seen.after, seen.head}
    return tuple(
        path for path in chosen if path not in twice and any(True for _ in model.get_submodule(path).parameters())
    )


def leave_out(model: nn.Module, parts: Parts, paths: Sequence[str]) -> nn.Module:
    """`model` without the modules at these paths, in place."""
    widths = outside_of(model, parts).widths if paths else {}
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    for path in paths:
        table = getattr(model.get_submodule(path), "weight", None)
        rows = int(table.shape[0]) if isinstance(table, Tensor) else 0
        model.set_submodule(path, Absent(rows, widths[path], dtype, per_token=path in (parts.embedding, parts.head)))
    return model
