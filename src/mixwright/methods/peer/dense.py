"""Neurons back in a dense feed-forward layer."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mixwright.experts.neuron import NeuronExperts
from mixwright.methods.peer.neurons import Neurons
from mixwright.ops.neuron import Activation, activate


class FeedForward(nn.Module):
    """f(x) = W_out act(W_in x + b) + c, or W_out (act(W_gate x + b') * (W_in x + b)) + c: plain linear layers."""

    def __init__(self, neurons: Neurons) -> None:
        super().__init__()
        self.activation: Activation = neurons.activation
        parts, hidden = neurons.rows.shape[1] - 1, len(neurons)
        like = {"device": neurons.rows.device, "dtype": neurons.rows.dtype}
        biased = neurons.bias is not None
        self.inward = nn.Linear(neurons.width, hidden, bias=biased, **like)
        self.gate = nn.Linear(neurons.width, hidden, bias=biased, **like) if parts == 2 else None
        self.out = nn.Linear(hidden, neurons.width, bias=neurons.out_bias is not None, **like)
        with torch.no_grad():
            for part, layer in enumerate(filter(None, (self.inward, self.gate))):
                layer.weight.copy_(neurons.rows[:, part])
                if neurons.bias is not None:
                    layer.bias.copy_(neurons.bias[:, part])
            self.out.weight.copy_(neurons.rows[:, -1].T)
            if neurons.out_bias is not None:
                self.out.bias.copy_(neurons.out_bias)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Every neuron acts."""
        before = (self.inward(x),) if self.gate is None else (self.inward(x), self.gate(x))
        return self.out(activate(torch.stack(before, -1), self.activation))


@torch.no_grad()
def neurons_of(experts: NeuronExperts, ids: Int[Tensor, " ids"] | None = None) -> Neurons:
    """Some neurons of a layer, or all, as they act at weight 1; narrow rows are multiplied out.

    Raises ValueError for experts that are no neurons, and for an output gate, which no feed-forward layer has.
    """
    table = experts.table
    if table.parts == 1:
        raise ValueError("these experts are a memory of values, which no feed-forward layer is.")
    if experts.output_gate is not None:
        raise ValueError("what these experts say is gated on its way out, which no feed-forward layer does.")
    device = next(experts.parameters()).device
    chosen = torch.arange(table.num_experts, device=device) if ids is None else ids.to(device)
    rows, bias = table.take(chosen)
    into, out_of = experts.project_in, experts.project_out
    inward, out = rows[:, :-1], rows[:, -1]
    if isinstance(into, nn.Linear):
        if "bias" in dict(into.named_parameters()):
            shift = inward @ into.bias
            bias = shift if bias is None else bias + shift
        inward = inward @ into.weight
    out_bias = experts.out_bias
    if isinstance(out_of, nn.Linear):
        out = out @ out_of.weight.T
        if "bias" in dict(out_of.named_parameters()):
            out_bias = out_of.bias if out_bias is None else out_of.bias + out_bias
    copied = (None if t is None else t.detach().clone() for t in (bias, out_bias))
    return Neurons(torch.cat([inward, out[:, None]], 1), experts.activation, *copied)


def to_ffn(experts: NeuronExperts, ids: Int[Tensor, " ids"] | None = None) -> FeedForward:
    """A dense feed-forward layer of some neurons, or of all, each at weight 1."""
    return FeedForward(neurons_of(experts, ids))
