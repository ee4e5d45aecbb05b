"""What a model's forward computes and holds, counted operation by operation as the installed code carries it out."""

from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_READ_ONCE = frozenset(
    {"sum", "mean", "var", "var_mean", "cumsum", "amax", "_softmax", "_log_softmax", "native_layer_norm", "logsumexp"}
)


class Operations(TorchDispatchMode):
    """Floating-point operations by `section`, which hooks set, and the most bytes that were alive at once.

    `products`: of matrix products and convolutions, two for each multiplication with its addition. `elementwise`: of
    all else, one for each number that is written, or read by a sum. `peak` counts what was made while it looked.
    """

    def __init__(self) -> None:
        super().__init__()
        self.section = ""
        self.products: Counter[str] = Counter()
        self.elementwise: Counter[str] = Counter()
        self.peak = 0
        self._alive = 0
        self._holders: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        del types
        given = dict(kwargs or {})
        out = func(*args, **given)
        packet = func.overloadpacket
        if packet in flop_registry:
            self.products[self.section] += flop_registry[packet](*args, **given, out_val=out)
        elif torch.Tag.pointwise in func.tags:
            self.elementwise[self.section] += sum(t.numel() for t in _tensors(out) if t.is_floating_point())
        elif packet.__name__ in _READ_ONCE:
            self.elementwise[self.section] += sum(t.numel() for t in _tensors(args)[:1] if t.is_floating_point())
        for tensor in _tensors(out):
            self._hold(tensor)
        return out

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if not place:
            return
        if not self._holders[place]:
            self._alive += size
            self.peak = max(self.peak, self._alive)
        self._holders[place] += 1
        finalize(tensor, partial(self._let_go, place, size))

    def _let_go(self, place: int, size: int) -> None:
        self._holders[place] -= 1
        if not self._holders[place]:
            self._alive -= size


@contextmanager
def counted(sections: Mapping[nn.Module, str], first: str = "") -> Generator[Operations]:
    """Counts what is computed in the block; from the entry of each module of `sections` on, it goes by that name.

    Attention is taken apart into its matrix products, so that they are counted.
    """
    mode = Operations()
    mode.section = first

    def enter(name: str, module: nn.Module, args: Any) -> None:
        del module, args
        mode.section = name

    hooks = [module.register_forward_pre_hook(partial(enter, name)) for module, name in sections.items()]
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), mode:
            yield mode
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
