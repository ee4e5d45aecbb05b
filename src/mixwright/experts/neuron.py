"""Experts of a single neuron each, up to a million of them."""

from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mixwright.experts.base import AbstractExperts
from mixwright.experts.table import AbstractTable, NeuronTable
from mixwright.ops.neuron import Activation
from mixwright.routing import Condition, Routing


class OutputGate(nn.Module):
    """y <- W2 (y * silu(W1 x)): the memory+ of Berges et al. 2024, section 3."""

    def __init__(self, d_in: int, width: int, d_out: int, bias: bool = True) -> None:
        super().__init__()
        self.gate = nn.Linear(d_in, width, bias=bias)
        self.out = nn.Linear(width, d_out, bias=bias)
        for layer in (self.gate, self.out):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    def forward(
        self, x: Float[Tensor, "*batch d_in"], y: Float[Tensor, "*batch width"]
    ) -> Float[Tensor, "*batch d_out"]:
        """The gated output."""
        return self.out(y * nn.functional.silu(self.gate(x)))


class NeuronExperts(AbstractExperts):
    """y = P_out sum_k w_k act(<u_k, P_in x>) v_k (He 2024, equation 6); the projections where rows are narrow.

    `table` may be shared with other layers. `out_bias` `(d_out,)` is added always, as a feed-forward layer's is.
    `output_gate`: memory+'s, after the projection. `dropout`: of the neurons' values, in training. `grown`: rows in
    use (later ones are new), heads, and slots of each head that are kept for new rows; None where nothing is new.
    """

    def __init__(
        self,
        table: AbstractTable,
        activation: Activation = "gelu",
        project_in: nn.Module | None = None,
        project_out: nn.Module | None = None,
        out_bias: Float[Tensor, " d_out"] | None = None,
        *,
        output_gate: OutputGate | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if activation not in get_args(Activation):
            raise ValueError(f"activation={activation!r} is unknown; accepted are {', '.join(get_args(Activation))}.")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout={dropout}; accepted is a share from 0 to below 1.")
        self.table = table
        self.activation: Activation = activation
        self.project_in, self.project_out = project_in, project_out
        self.out_bias = None if out_bias is None else nn.Parameter(out_bias)
        self.output_gate, self.dropout = output_gate, dropout
        self.grown: Int[Tensor, " 3"] | None
        self.register_buffer("grown", None)

    @property
    def num_experts(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]  (the table may grow)
        """Rows of the table."""
        return self.table.num_experts

    def forward(
        self, x: Float[Tensor, "*batch d_in"], routing: Routing, condition: Condition
    ) -> Float[Tensor, "*batch d_out"]:
        """The retrieved neurons' weighted sum."""
        del condition
        inside, weights, indices = self._by_token(x, routing)
        if self.dropout and self.training:
            weights = nn.functional.dropout(weights, self.dropout)
        with torch.autocast(x.device.type, enabled=False):
            found = self._sum(inside, weights, indices)
        return self.outward(x, found.view(*x.shape[:-1], found.shape[-1]))

    def inward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch width"]:
        """What the rows meet."""
        return x if self.project_in is None else self.project_in(_as_wide_as(self.project_in, x)).to(x.dtype)

    def outward(
        self, x: Float[Tensor, "*batch d_in"], found: Float[Tensor, "*batch width"]
    ) -> Float[Tensor, "*batch d_out"]:
        """What becomes of the rows' sum: for a given `x` affine in `found`, so that each neuron's part has its own."""
        out = found if self.project_out is None else self.project_out(_as_wide_as(self.project_out, found))
        if self.output_gate is not None:
            out = self.output_gate(_as_wide_as(self.output_gate, x), _as_wide_as(self.output_gate, out))
        out = out.to(found.dtype)
        return out if self.out_bias is None else out + self.out_bias.to(out.dtype)

    def _by_token(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
        if routing.indices is None:
            raise ValueError(
                f"neurons need a routing that names them; this one weighs all {routing.num_experts} without indices."
            )
        inside = self.inward(x)
        if inside.shape[-1] != self.table.width:
            raise ValueError(
                f"x has width {inside.shape[-1]} where it meets rows of width {self.table.width}; give x of the width "
                "that this layer was built for."
            )
        shape = (*x.shape[:-1], routing.indices.shape[-1])
        weights, indices = (t.expand(shape).reshape(-1, shape[-1]) for t in (routing.weights, routing.indices))
        return inside.reshape(-1, inside.shape[-1]), weights, indices

    def _sum(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        table = self.table
        if self.grown is None or not isinstance(table, NeuronTable):
            return table(x, weights, indices, self.activation)
        reach, heads, added = self.grown.tolist()
        if not added:
            return table(x, weights, indices, self.activation, reach=reach)
        slots = weights.shape[-1] // heads
        old, new = (
            [t.unflatten(-1, (heads, slots))[..., part].flatten(-2) for t in (weights, indices)]
            for part in (slice(slots - added), slice(slots - added, None))
        )
        return table(x, *old, self.activation, reach=reach) + table(x, *new, self.activation)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        held = state_dict.get(f"{prefix}grown")
        if isinstance(held, Tensor) and self.grown is None:
            self.register_buffer("grown", torch.zeros_like(held))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _as_wide_as(module: nn.Module, x: Tensor) -> Tensor:
    """`x` in the type of a layer's weights: a backbone may be narrower than what is trained beside it."""
    return x.to(next((p.dtype for p in module.parameters()), x.dtype))
