"""Weights changed in place, and taken back to the last bit: the bytes that were overwritten are kept."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mixwright.ops.digest import tensor_digest


class Rollback:
    """What a model's parameters were before each change in place; changes are taken back in reverse order.

    Nothing on disk is ever touched: a process that is killed in the middle leaves what it was loaded from.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept: list[dict[str, Tensor]] = []
        self._digest: dict[str, str] | None = None

    @property
    def depth(self) -> int:
        """Changes that stand."""
        return len(self._kept)

    @torch.inference_mode(False)
    @torch.no_grad()
    def apply(self, weights: Mapping[str, Tensor]) -> None:
        """Write these parameters in place, all or none.

        Raises ValueError for a name or a shape that does not fit. Whatever goes wrong, what was written is taken back.
        """
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

    @torch.inference_mode(False)
    @torch.no_grad()
    def undo(self) -> None:
        """Take back the last change. Raises ValueError where there is none."""
        if not self._kept:
            raise ValueError("nothing to take back: the weights are the pretrained ones.")
        try:
            self._restore()
        except BaseException:  # an interruption: once more, to the end
            self._restore()
            self._kept.pop()
            raise
        self._kept.pop()

    def pristine(self) -> dict[str, Tensor]:
        """Every parameter as it was before any change."""
        found: dict[str, Tensor] = {name: parameter.detach() for name, parameter in self._model.named_parameters()}
        for before in reversed(self._kept):
            found.update(before)
        return found

    def seal(self) -> None:
        """Note the digests of all weights, by which `is_pristine` judges; once, before the first change."""
        if self._digest is None and not self._kept:
            self._digest = tensor_digest(self._model)

    def is_pristine(self) -> bool:
        """Whether every parameter and buffer has the bytes that it had when it was sealed."""
        self.seal()
        return self._digest == tensor_digest(self._model)

    def _restore(self) -> None:
        parameters = dict(self._model.named_parameters())
        for name, tensor in self._kept[-1].items():
            parameters[name].copy_(tensor)
