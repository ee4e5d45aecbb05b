"""The activations of neurons, by name."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mixwright.ops.neuron import Activation

_FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
    "relu_squared": lambda x: functional.relu(x).square(),
}


def activate(x: Float[Tensor, "*any"], activation: Activation) -> Float[Tensor, "*any"]:
    """act(x)."""
    return _FUNCTIONS[activation](x)


def all_activations(
    x: Float[Tensor, "*batch width"],
    rows: Float[Tensor, "experts parts width"],
    activation: Activation,
    bias: Float[Tensor, "experts inputs"] | None = None,
) -> Float[Tensor, "*batch experts"]:
    """What every neuron of a table says before its weight: the dense form of `neuron_activations`."""
    before = [x @ rows[:, part].T for part in range(rows.shape[1] - 1)]
    if bias is not None:
        before = [value + bias[:, part] for part, value in enumerate(before)]
    return activate(before[-1], activation) * (before[0] if len(before) == 2 else 1.0)
