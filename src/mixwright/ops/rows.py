"""Rows of a model's inputs, whether these are one tensor or several by name: taken, joined, counted."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

Inputs = Tensor | Mapping[str, Tensor]
"""What a backbone reads: images as one tensor, or token ids and their mask by name; rows come first."""


def take(inputs: Inputs, rows: Tensor | Sequence[int] | slice) -> Inputs:
    """The rows of the inputs that are asked for, in that order; a slice is a view."""
    if isinstance(inputs, Tensor):
        return _take(inputs, rows)
    return {name: _take(tensor, rows) for name, tensor in inputs.items()}


def join(first: Inputs, second: Inputs) -> Inputs:
    """The rows of the one, then those of the other.

    Token ids of two widths become as wide as the wider, with zeros on the right where `attention_mask` is zero too.
    Raises TypeError for a tensor beside a mapping, ValueError for other names and for shapes that do not go together.
    """
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return _join("inputs", first, second, False)
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        raise TypeError("rows to be joined: a tensor and a mapping of tensors; expected two of one kind.")
    if set(first) != set(second):
        raise ValueError(f"rows to be joined have {', '.join(sorted(first))} and {', '.join(sorted(second))}.")
    masked = "attention_mask" in first
    return {name: _join(name, tensor, second[name], masked) for name, tensor in first.items()}


def count(inputs: Inputs) -> int:
    """How many rows there are. Raises ValueError where tensors disagree, or there is none."""
    if isinstance(inputs, Tensor):
        if inputs.ndim == 0:
            raise ValueError("inputs: a single number; expected a tensor whose first axis counts items.")
        return inputs.shape[0]
    counts = {name: tensor.shape[0] if tensor.ndim else -1 for name, tensor in inputs.items()}
    if len(set(counts.values())) != 1:
        shown = ", ".join(f"{name} {number}" for name, number in counts.items()) or "no tensor at all"
        raise ValueError(f"inputs: rows do not agree ({shown}); every tensor needs the same number of them.")
    return next(iter(counts.values()))


def move(inputs: Inputs, device: torch.device | str) -> Inputs:
    """The same rows on another device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _take(tensor: Tensor, rows: Tensor | Sequence[int] | slice) -> Tensor:
    if isinstance(rows, slice):
        return tensor[rows]
    return tensor[torch.as_tensor(rows, dtype=torch.long, device=tensor.device)]


def _join(name: str, first: Tensor, second: Tensor, masked: bool) -> Tensor:
    widths = (first.shape[1], second.shape[1]) if masked and first.ndim == second.ndim == 2 else ()
    if widths and widths[0] != widths[1]:
        first, second = (pad(tensor, (0, max(widths) - tensor.shape[1])) for tensor in (first, second))
    if first.shape[1:] != second.shape[1:]:
        raise ValueError(
            f"{name}: rows of shape {tuple(first.shape[1:])} and of shape {tuple(second.shape[1:])} do not go "
            "together; bring them to one size first."
        )
    return torch.cat([first, second])
