"""Features of items under the pretrained weights, which do not change: those of items seen before are kept."""

import hashlib
from collections import OrderedDict

import torch
from jaxtyping import Float
from torch import Tensor

from mixwright.methods.smat.model import FewShotModel
from mixwright.ops.rows import Inputs, count, take


class FrozenFeatures:
    """f(x; theta_pre), with the vectors of up to `capacity` items kept by the bytes of the item.

    With a capacity each item has a pass of its own, so that its vector does not depend on what it came with, and a run
    that is resumed with an empty store goes on to the same bits.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.passes = 0
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, model: FewShotModel, inputs: Inputs) -> Float[Tensor, "items width"]:
        """Features of a batch of items."""
        if self.capacity == 0:
            self.passes += count(inputs)
            return model.frozen_features(inputs)
        return torch.stack([self._one(model, take(inputs, slice(i, i + 1))) for i in range(count(inputs))])

    def _one(self, model: FewShotModel, item: Inputs) -> Tensor:
        key = _content(item)
        if key not in self._kept:
            self.passes += 1
            self._kept[key] = model.frozen_features(item)[0]
            if len(self._kept) > self.capacity:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


def _content(item: Inputs) -> str:
    tensors = {"": item} if isinstance(item, Tensor) else item
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        raw = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(raw.shape)} {raw.dtype} {tensor.device}".encode())
        digest.update(raw.view(torch.uint8).numpy().tobytes() if raw.ndim else str(raw.item()).encode())
    return digest.hexdigest()
