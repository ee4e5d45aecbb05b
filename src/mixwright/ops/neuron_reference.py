"""Sums over retrieved single-neuron experts as they are written: y = sum_k w_k act(<u_k, x>) v_k.

He 2024, equations 2 and 6. `ops/neuron.py` has the fast ways.

The rows of an expert lie side by side in one table `(experts, parts, width)`. Parts 1: v, a memory of values. Parts 2:
u and v, a neuron. Parts 3: u, g and v, a gated neuron w act(<g, x>) <u, x> v.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "relu_squared"]
ACTIVATIONS: tuple[Activation, ...] = ("gelu", "gelu_tanh", "relu", "silu", "relu_squared")
Gradient = Literal["dense", "compact", "auto"]

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
    "relu_squared": lambda x: functional.relu(x).square(),
}


def neuron_activations(
    x: Float[Tensor, "tokens width"],
    rows: Float[Tensor, "experts parts width"],
    indices: Int[Tensor, "tokens k"],
    activation: Activation,
    bias: Float[Tensor, "experts inputs"] | None = None,
) -> Float[Tensor, "tokens k"]:
    """What each retrieved neuron says before its weight: act(<u, x> + b); 1 for a memory of values."""
    parts = rows.shape[1]
    if parts == 1:
        return x.new_ones(indices.shape)
    before = torch.einsum("td,tkpd->tkp", x, rows[indices, : parts - 1].to(x.dtype))
    if bias is not None:
        before = before + bias[indices].to(x.dtype)
    return activate(before, activation)


def activate(before: Float[Tensor, "*batch inputs"], activation: Activation) -> Float[Tensor, "*batch"]:
    """act(before_0), or of a gated neuron act(before_1) before_0."""
    if before.shape[-1] == 1:
        return _FUNCTIONS[activation](before[..., 0])
    return _FUNCTIONS[activation](before[..., 1]) * before[..., 0]


def neurons_reference(
    x: Float[Tensor, "tokens width"],
    rows: Float[Tensor, "experts parts width"],
    weights: Float[Tensor, "tokens k"],
    indices: Int[Tensor, "tokens k"],
    activation: Activation,
    bias: Float[Tensor, "experts inputs"] | None = None,
) -> Float[Tensor, "tokens width"]:
    """The sum as it is written, gathering every row."""
    hidden = neuron_activations(x, rows, indices, activation, bias) * weights.to(x.dtype)
    return torch.einsum("tk,tkd->td", hidden, rows[indices, -1].to(x.dtype))
