"""Weights changed in place, and taken back to the last bit: the bytes that were overwritten are kept."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Rollback:
    """What a model's parameters were before each change in place; changes are taken back in reverse order."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept: list[dict[str, Tensor]] = []

    @property
    def depth(self) -> int:
        """Changes that stand."""
        return len(self._kept)

    @torch.no_grad()
    def apply(self, weights: Mapping[str, Tensor]) -> None:
        """Write these parameters in place. Nothing is changed where a name or a shape does not fit (ValueError)."""
        parameters = dict(self._model.named_parameters())
        for name, tensor in weights.items():
            if name not in parameters or parameters[name].shape != tensor.shape:
                raise ValueError(f"{name} {tuple(tensor.shape)} is no parameter of this model.")
        before = {name: parameters[name].detach().clone() for name in weights}
        self._kept.append(before)
        try:
            for name, tensor in weights.items():
                parameters[name].copy_(tensor)
        except BaseException:
            self.undo()
            raise

    @torch.no_grad()
    def undo(self) -> None:
        """Take back the last change. Raises ValueError where there is none."""
        if not self._kept:
            raise ValueError("nothing to take back: the weights are the pretrained ones.")
        parameters = dict(self._model.named_parameters())
        for name, tensor in self._kept[-1].items():
            parameters[name].copy_(tensor)
        self._kept.pop()

    def pristine(self) -> dict[str, Tensor]:
        """Every parameter as it was before any change."""
        found: dict[str, Tensor] = {name: parameter.detach() for name, parameter in self._model.named_parameters()}
        for before in reversed(self._kept):
            found.update(before)
        return found
