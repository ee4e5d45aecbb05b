"""A feed-forward layer read as neurons: which weights are which is guessed from their shapes and proved by running it.

Names tell little in foreign models, and an activation hides in code. So every reading that the shapes allow is tried
on the layer itself, in float64, and the one that gives the layer's own output is taken.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mixwright.ops.neuron import ACTIVATIONS, Activation, activate
from mixwright.sites import linear_site

TOLERANCE = 1e-6
"""Largest error of a reading, as a share of the largest output; GELU and its tanh form are about 1e-4 apart."""
_TOKENS = 48
_SCALES = (0.3, 1.0, 3.0)

Stage = nn.Module | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Neurons:
    """A feed-forward layer as rows: f(x) = sum_e act(<u_e, x> + b_e) v_e + c, gated where there are three parts.

    Parts: in, out; or in, gate, out. `bias`: of in, and of gate.
    """

    rows: Float[Tensor, "experts parts width"]
    activation: Activation
    bias: Float[Tensor, "experts inputs"] | None = None
    out_bias: Float[Tensor, " width"] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def width(self) -> int:
        """Of the layer's input and output."""
        return self.rows.shape[-1]

    def hidden(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch experts"]:
        """What each neuron says of x, before its row out."""
        before = torch.stack([x @ self.rows[:, part].T for part in range(self.rows.shape[1] - 1)], -1)
        return activate(before if self.bias is None else before + self.bias, self.activation)

    def importance(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch experts"]:
        """How much each neuron moves the output: |act| |v|."""
        return self.hidden(x).abs() * self.rows[:, -1].norm(dim=-1)

    def arranged(self, cells: Int[Tensor, " experts"], count: int) -> "Neurons":
        """The same layer as a table of `count` neurons, neuron e at the place `cells[e]`; the others are of zeros."""
        rows = self.rows.new_zeros(count, *self.rows.shape[1:]).index_copy(0, cells, self.rows)
        bias = self.bias
        if bias is not None:
            bias = bias.new_zeros(count, bias.shape[1]).index_copy(0, cells, bias)
        return replace(self, rows=rows, bias=bias)

    def __call__(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """What the layer gives."""
        out = self.hidden(x) @ self.rows[:, -1]
        return out if self.out_bias is None else out + self.out_bias


def read_neurons(layer: Stage | Sequence[Stage], where: str = "the layer") -> Neurons:
    """The neurons of a feed-forward layer: a module, or what is applied one after the other where it is no module.

    One such sequence is `[block.fc1, block.activation_fn, block.fc2]`. Understood are two linear layers (Conv1D
    included) around an activation of `ops.neuron`, three with a gate, and two where in and gate are fused. Raises
    ValueError for a layer that is none of these, and for one whose output these weights do not give.
    """
    stages = [layer] if isinstance(layer, nn.Module) or callable(layer) else list(layer)
    whole = [deepcopy(stage).double().eval() if isinstance(stage, nn.Module) else stage for stage in stages]
    linears = [module for stage in whole if isinstance(stage, nn.Module) for module in _linears(stage)]
    if any(tensor.is_meta for module in linears for tensor in module.parameters()):
        raise ValueError(f"{where} has no weights yet (they are on the meta device); load them first.")
    best: tuple[float, Neurons] | None = None
    trouble = ""
    for reading in _readings([_weights(module, where) for module in linears]):
        x = _inputs(reading)
        wanted = _run(whole, x)
        if isinstance(wanted, str):
            trouble = wanted  # in and out taken for each other, unless no reading runs
            continue
        for found in (Neurons(reading.rows, name, reading.bias, reading.out_bias) for name in ACTIVATIONS):
            error = _error(found, x, wanted)
            best = (error, found) if best is None or error < best[0] else best
    if best is None and trouble:
        raise ValueError(f"{where} {trouble}; a feed-forward layer takes one tensor and gives one of the same shape.")
    if best is None:
        shapes = ", ".join(str(tuple(w.shape)) for w, _ in (_weights(module, where) for module in linears))
        raise ValueError(
            f"{where} is no feed-forward layer that can be read: its linear layers have the shapes (out, in) "
            f"{shapes or 'of none'}; expected d -> f and f -> d, two d -> f and one f -> d, or d -> 2f and f -> d."
        )
    if best[0] > TOLERANCE:
        raise ValueError(
            f"{where} can't be read as neurons: its linear layers with {best[1].activation}, the best of "
            f"{', '.join(ACTIVATIONS)}, miss its output by {best[0]:.1e} of its size. It has another activation, or "
            f"something more acts in it ({_others(whole, linears)}), such as a norm, a scale or a residual connection; "
            "give the part of it that is linear, activation, linear."
        )
    return _typed(best[1], stages)


def _linears(stage: nn.Module) -> list[nn.Module]:
    return [module for path, module in stage.named_modules() if linear_site(path, module) is not None]


def _weights(module: nn.Module, where: str) -> tuple[Tensor, Tensor | None]:
    """The weight as (out, in), and the bias."""
    site = linear_site("", module)
    assert site is not None
    weight, bias = module.weight, getattr(module, "bias", None)
    weight = weight.T if site.transposed else weight  # type: ignore[union-attr]
    if not isinstance(weight, Tensor) or tuple(weight.shape) != (site.d_out, site.d_in):
        raise ValueError(f"{where} holds its weights packed or quantised; load the backbone in plain precision.")
    return weight.detach(), bias.detach() if isinstance(bias, Tensor) else None


def _readings(linears: Sequence[tuple[Tensor, Tensor | None]]) -> Iterator[Neurons]:
    """Every way of naming the weights in, gate and out that their shapes allow."""
    for order in permutations(linears) if len(linears) in (2, 3) else ():
        (out, out_bias), inputs = order[-1], order[:-1]
        width, hidden = out.shape
        if len(inputs) == 1 and inputs[0][0].shape == (2 * hidden, width):
            weight, bias = inputs[0]
            for one, other in ((slice(0, hidden), slice(hidden, None)), (slice(0, None, 2), slice(1, None, 2))):
                halves = [(weight[part], None if bias is None else bias[part]) for part in (one, other)]
                yield _neurons(halves, out, out_bias)
                yield _neurons(halves[::-1], out, out_bias)
        elif all(weight.shape == (hidden, width) for weight, _ in inputs):
            yield _neurons(inputs, out, out_bias)


def _neurons(inputs: Sequence[tuple[Tensor, Tensor | None]], out: Tensor, out_bias: Tensor | None) -> Neurons:
    rows = torch.stack([*(weight for weight, _ in inputs), out.T], 1)
    biased = any(bias is not None for _, bias in inputs)
    biases = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in inputs]
    return Neurons(rows, "relu", torch.stack(biases, 1) if biased else None, out_bias)


def _inputs(neurons: Neurons) -> Float[Tensor, "1 tokens width"]:
    """Inputs small and large beside where the neurons bend."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(len(_SCALES), _TOKENS, neurons.width, generator=draw, dtype=torch.float64).to(neurons.rows)
    size = torch.einsum("std,nd->stn", x, neurons.rows[:, -2]).std().clamp_min(1e-30)
    return (x * x.new_tensor(_SCALES)[:, None, None] / size).flatten(0, 1)[None]


def _run(stages: Sequence[Stage], x: Tensor) -> Tensor | str:
    """The layer's output, or why there is none."""
    out: Any = x
    with torch.no_grad():
        try:
            for stage in stages:
                out = stage(out)
        except (TypeError, RuntimeError, ValueError, IndexError) as error:
            reason = " ".join(str(error).split())[:160]
            return f"can't be run on one tensor of {tuple(x.shape)} ({reason})"
    out = out[0] if isinstance(out, tuple) and out else out
    if not isinstance(out, Tensor) or out.shape != x.shape:
        return f"does not give one tensor of its input's shape {tuple(x.shape)}"
    return out


def _error(neurons: Neurons, x: Tensor, wanted: Tensor) -> float:
    """The largest error at any of the input sizes, over the largest output there."""
    with torch.no_grad():
        gap, size = ((t.unflatten(1, (-1, _TOKENS)).abs().amax((0, 2, 3))) for t in (neurons(x) - wanted, wanted))
    error = (gap / size.clamp_min(1e-30)).max()
    return float(error) if error == error else float("inf")


def _others(stages: Sequence[Stage], linears: Sequence[nn.Module]) -> str:
    inside = {id(module) for module in linears}
    leaves = [m for s in stages if isinstance(s, nn.Module) for m in s.modules() if not list(m.children())]
    names = dict.fromkeys(type(module).__name__ for module in leaves if id(module) not in inside)
    return "it holds " + ", ".join(names) if names else "it holds no other module"


def _typed(neurons: Neurons, stages: Sequence[Stage]) -> Neurons:
    """As wide as the layer's own weights; half precision, which no table has, becomes float32."""
    module = next(stage for stage in stages if isinstance(stage, nn.Module) and list(stage.parameters()))
    dtype = next(module.parameters()).dtype
    dtype = torch.float32 if dtype is torch.float16 else dtype
    parts = (None if t is None else t.to(dtype).contiguous() for t in (neurons.rows, neurons.bias, neurons.out_bias))
    rows, bias, out_bias = parts
    assert rows is not None
    return Neurons(rows, neurons.activation, bias, out_bias)
