"""Which tensors Triton's kernels take. Triton is imported on first use; without it torch's own path runs, said once."""

import logging
from functools import cache

import torch
from torch import Tensor

from mixwright.errors import MissingExtra
from mixwright.ops.neuron_gradients import AbstractPasses

logger = logging.getLogger(__name__)


def on_gpu(tensor: Tensor) -> bool:
    """Whether this lies where Triton's kernels run."""
    return tensor.is_cuda


def neuron_passes(x: Tensor, rows: Tensor) -> AbstractPasses | None:
    """The arithmetic of single-neuron experts in Triton, if these tensors are for it."""
    if not on_gpu(x) or not _there():
        return None
    from mixwright.ops.triton.neuron import TritonPasses, fits

    return TritonPasses(_programs(x.device)) if fits(x, rows) else None


def best_keys(
    queries: Tensor, first: Tensor, second: Tensor, k: int, first_bias: Tensor | None, second_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Scores, ids, log-partition and entropy of product keys by Triton, if these tensors are for it."""
    if not on_gpu(queries) or not queries.numel() or not _there():
        return None
    from mixwright.ops.triton import route

    if not route.fits(queries, first, second, k):
        return None
    return route.best_keys(queries, first, second, k, first_bias, second_bias)


def _programs(device: torch.device) -> int:
    """How many programs keep the device busy."""
    if device.type != "cuda":
        return 1
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


@cache  # what is installed does not change; said once in a process
def _there() -> bool:
    try:
        import mixwright.ops.triton as found
    except MissingExtra as missing:
        logger.warning("PEER runs without its GPU kernels, several times slower: %s", missing)
        return False
    return bool(found)
