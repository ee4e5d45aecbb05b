"""Which neurons made up a layer's output, token by token: found how, how sure, and how much each one added.

A layer of retrieved neurons is a sum, so it can be taken apart without loss: what is left after every neuron's part is
what does not depend on any, such as an output bias.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mixwright.evaluation.neuron_sites import neurons_of, plain_router
from mixwright.experts.dense_branch import DenseBranch
from mixwright.experts.neuron import NeuronExperts
from mixwright.ops.neuron import activate
from mixwright.routers.retriever import AbstractRetriever
from mixwright.routing import Condition

_CHUNK = 16


@dataclass(frozen=True, kw_only=True)
class ActingNeuron:
    """One retrieved neuron on one token: its place `(i, j)` in the grid, and the length of what it added."""

    id: int
    place: tuple[int, int]
    head: int
    score: float
    gate: float
    activation: float
    norm: float


@dataclass(frozen=True, kw_only=True)
class NeuronTrace:
    """What one site did with some tokens; token axes are flat, the slots of a token are heads * k.

    `ids`, `scores`, `gates`, `activations`, `norms` `(tokens, slots)`: who, the score before the gate, the weight, the
    neuron's value before it, and the length of w act(..) v on its way out; `head` `(slots,)`. A slot with a gate of
    zero did not act. `coverage`, `entropy`, `margin` `(tokens, heads)`; no margin where the number of experts varies.
    `flagged` `(tokens, heads)`: unsure heads, None where nothing flags. `dense`, `dense_norm` `(tokens,)`: weight and
    length of the dense branch, where there is one. `rest` `(tokens, d_out)`: what no neuron added. `outputs`
    `(tokens, d_out)`: the sum of all.
    """

    grid: tuple[int, int]
    head: Int[Tensor, " slots"]
    ids: Int[Tensor, "tokens slots"]
    scores: Float[Tensor, "tokens slots"]
    gates: Float[Tensor, "tokens slots"]
    activations: Float[Tensor, "tokens slots"]
    norms: Float[Tensor, "tokens slots"]
    coverage: Float[Tensor, "tokens heads"] | None
    entropy: Float[Tensor, "tokens heads"] | None
    margin: Float[Tensor, "tokens heads"] | None
    flagged: Bool[Tensor, "tokens heads"] | None
    dense: Float[Tensor, " tokens"] | None
    dense_norm: Float[Tensor, " tokens"] | None
    rest: Float[Tensor, "tokens d_out"]
    outputs: Float[Tensor, "tokens d_out"]

    def token(self, token: int, most: int | None = None) -> list[ActingNeuron]:
        """The neurons that acted on a token, the largest part first, or the `most` largest."""
        order = self.norms[token].argsort(descending=True, stable=True).tolist()
        acted = [slot for slot in order if float(self.gates[token, slot]) != 0][:most]
        return [
            ActingNeuron(
                id=int(self.ids[token, slot]),
                place=divmod(int(self.ids[token, slot]) % (self.grid[0] * self.grid[1]), self.grid[1]),
                head=int(self.head[slot]),
                score=float(self.scores[token, slot]),
                gate=float(self.gates[token, slot]),
                activation=float(self.activations[token, slot]),
                norm=float(self.norms[token, slot]),
            )
            for slot in acted
        ]


@torch.no_grad()
def trace_neurons(
    router: AbstractRetriever, experts: nn.Module, x: Float[Tensor, "*batch d_in"], condition: Condition | None = None
) -> NeuronTrace:
    """Take apart what `experts` make of `x` under `router`, both as they stand; put them in eval mode first."""
    given = condition or Condition()
    found = router.retrieve(x, given, detail=True)
    neurons = neurons_of(experts)
    flat = x.reshape(-1, x.shape[-1])
    heads, k = found.indices.shape[-2:]
    indices, gates, scores = (t.reshape(len(flat), heads * k) for t in (found.indices, found.gates, found.scores))
    parts = [
        neuron_parts(neurons, *chunk)
        for chunk in zip(flat.split(_CHUNK), gates.split(_CHUNK), indices.split(_CHUNK), strict=True)
    ]
    rest = neurons.outward(flat, torch.zeros_like(neurons.inward(flat)))
    outputs = torch.cat([part.sum(1) for _, part in parts]) + rest if parts else rest
    dense = dense_norm = None
    if found.dense is not None and isinstance(experts, DenseBranch):
        dense = found.dense.reshape(-1)
        added = experts.dense(flat) * dense[:, None].to(flat.dtype)
        dense_norm, outputs = added.float().norm(dim=-1), outputs + added
    measures = {name: getattr(found, name) for name in ("coverage", "entropy", "margin", "flagged")}
    return NeuronTrace(
        grid=plain_router(router).grid,
        head=torch.arange(heads).repeat_interleave(k),
        ids=indices,
        scores=scores,
        gates=gates,
        activations=torch.cat([hidden for hidden, _ in parts]) if parts else gates,
        norms=torch.cat([part.float().norm(dim=-1) for _, part in parts]) if parts else gates,
        **{name: None if m is None else m.reshape(len(flat), heads) for name, m in measures.items()},
        dense=dense,
        dense_norm=dense_norm,
        rest=rest,
        outputs=outputs,
    )


@torch.no_grad()
def neuron_parts(
    neurons: NeuronExperts,
    x: Float[Tensor, "tokens d_in"],
    weights: Float[Tensor, "tokens slots"],
    indices: Int[Tensor, "tokens slots"],
) -> tuple[Float[Tensor, "tokens slots"], Float[Tensor, "tokens slots d_out"]]:
    """Each retrieved neuron's value before its weight, and what it adds to the output."""
    ids, at = indices.unique(return_inverse=True)
    rows, bias = neurons.table.take(ids)
    inside = neurons.inward(x)
    rows = rows.to(inside.dtype)[at]
    if rows.shape[2] == 1:
        hidden = torch.ones_like(inside[:, :1]).expand(indices.shape)
    else:
        before = torch.einsum("td,tkpd->tkp", inside, rows[:, :, :-1])
        hidden = activate(before if bias is None else before + bias.to(inside.dtype)[at], neurons.activation)
    added = (hidden * weights.to(inside.dtype))[..., None] * rows[:, :, -1]
    many = x[:, None].expand(-1, indices.shape[1], -1).reshape(-1, x.shape[-1])
    whole = neurons.outward(many, added.flatten(0, 1)) - neurons.outward(many, torch.zeros_like(added.flatten(0, 1)))
    return hidden, whole.unflatten(0, indices.shape)
