"""Sums over retrieved single-neuron experts by the fastest path at hand: y = sum_k w_k act(<u_k, x>) v_k.

He 2024, equations 2 and 6. `neurons_reference` is the specification; `ops/neuron_kernel.py` is the compiled path,
`ops/triton/neuron.py` that of a GPU, `ops/neuron_plain.py` torch's own; where the table is so small that multiplying
all of it is cheaper than looking for the retrieved part, that is done.
"""

import logging
import os
from functools import cache

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from mixwright.ops import kernels
from mixwright.ops.gpu import neuron_passes
from mixwright.ops.huge_pages import SpareMemory
from mixwright.ops.neuron_gradients import AbstractPasses, Call, combine
from mixwright.ops.neuron_kernel import CompiledPasses, fits
from mixwright.ops.neuron_plain import PlainPasses, neurons_by_matmul
from mixwright.ops.neuron_reference import ACTIVATIONS as ACTIVATIONS
from mixwright.ops.neuron_reference import Activation as Activation
from mixwright.ops.neuron_reference import Gradient as Gradient
from mixwright.ops.neuron_reference import activate as activate
from mixwright.ops.neuron_reference import neuron_activations as neuron_activations
from mixwright.ops.neuron_reference import neurons_reference as neurons_reference

DENSE_BELOW = 2
"""Experts per retrieved one below which the whole table is multiplied."""

logger = logging.getLogger(__name__)


def combine_neurons(
    x: Float[Tensor, "tokens width"],
    rows: Float[Tensor, "experts parts width"],
    weights: Float[Tensor, "tokens k"],
    indices: Int[Tensor, "tokens k"],
    activation: Activation,
    bias: Float[Tensor, "experts inputs"] | None = None,
    *,
    gradient: Gradient = "dense",
    spare: SpareMemory | None = None,
) -> Float[Tensor, "tokens width"]:
    """`neurons_reference` without its memory; the fastest path that takes these tensors.

    `gradient`: what `rows` get in the backward pass. `compact`: a coalesced sparse tensor of the rows that act, its ids
    ascending. `auto`: compact below half of the rows. It is made in `spare` memory, if that is given. Pairs of weight 0
    don't act. bfloat16 rows are summed in float32.
    """
    if not _simple(x, rows, weights, indices, bias):
        return neurons_reference(x, rows, weights, indices, activation, bias)
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return _combine(x, rows, weights, indices, activation, bias, gradient, spare)
    return _combine(x, rows, weights, indices, activation, bias, gradient, spare)


def combine_quantised(
    x: Float[Tensor, "tokens width"],
    rows: Int8[Tensor, "experts parts width"],
    scales: Float[Tensor, "experts parts"],
    weights: Float[Tensor, "tokens k"],
    indices: Int[Tensor, "tokens k"],
    activation: Activation,
    bias: Float[Tensor, "experts inputs"] | None = None,
) -> Float[Tensor, "tokens width"] | None:
    """The sum with rows of int8 times the scale of each, by the compiled path; None where it takes no such call.

    It has no gradients.
    """
    asked = torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad)
    if asked or not _simple(x, rows, weights, indices, bias) or not fits(x, rows, bias):
        return None
    native = kernels.kernel()
    if native is None:
        return None
    return CompiledPasses(native).quantised(Call(x, rows, weights, indices, bias, activation), scales)


def _combine(
    x: Tensor,
    rows: Tensor,
    weights: Tensor,
    indices: Tensor,
    activation: Activation,
    bias: Tensor | None,
    gradient: Gradient,
    spare: SpareMemory | None,
) -> Tensor:
    dense = gradient == "dense" or not (torch.is_grad_enabled() and rows.requires_grad)
    if dense and rows.shape[0] < DENSE_BELOW * indices.shape[1] and len(x) >= 8:
        return neurons_by_matmul(x, rows, weights, indices, activation, bias)
    return combine(passes_for(x, rows, bias), x, rows, weights, indices, activation, bias, gradient, spare)


def passes_for(x: Tensor, rows: Tensor, bias: Tensor | None) -> AbstractPasses:
    """Who does the arithmetic on such tensors: a GPU's kernels, the compiled functions, or torch."""
    on_gpu = neuron_passes(x, rows)
    if on_gpu is not None:
        return on_gpu
    if fits(x, rows, bias):
        native = kernels.kernel()
        if native is not None:
            return CompiledPasses(native)
        if os.environ.get(kernels.SETTING) != "off":
            _say_plain(kernels.status())
    return PlainPasses()


@cache  # said once in a process for each reason
def _say_plain(status: str) -> None:
    logger.warning("PEER's experts run without their compiled kernel, several times slower: %s", status)


def _simple(*tensors: Tensor | None) -> bool:
    """Whether these are tensors as they come, with something in them."""
    if torch.compiler.is_compiling():
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    return all(type(t) in (Tensor, torch.nn.Parameter) and t.numel() and t.device.type != "meta" for t in given)
