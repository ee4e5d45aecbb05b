"""Experts of a single neuron each, up to a million of them."""

from jaxtyping import Float
from torch import Tensor, nn

from mixwright.experts.base import AbstractExperts
from mixwright.experts.table import AbstractTable
from mixwright.ops.neuron import Activation
from mixwright.routing import Condition, Routing


class NeuronExperts(AbstractExperts):
    """y = P_out sum_k w_k act(<u_k, P_in x>) v_k (He 2024, equation 6); the projections where rows are narrow.

    `table` may be shared with other layers. `out_bias` `(d_out,)` is added always, as a feed-forward layer's is.
    """

    def __init__(
        self,
        table: AbstractTable,
        activation: Activation = "gelu",
        project_in: nn.Module | None = None,
        project_out: nn.Module | None = None,
        out_bias: Float[Tensor, " d_out"] | None = None,
    ) -> None:
        super().__init__()
        self.table = table
        self.num_experts = table.num_experts
        self.activation: Activation = activation
        self.project_in, self.project_out = project_in, project_out
        self.out_bias = None if out_bias is None else nn.Parameter(out_bias)

    def forward(
        self, x: Float[Tensor, "*batch d_in"], routing: Routing, condition: Condition
    ) -> Float[Tensor, "*batch d_out"]:
        """The retrieved neurons' weighted sum."""
        del condition
        if routing.indices is None:
            raise ValueError(
                f"neurons need a routing that names them; this one weighs all {routing.num_experts} without indices."
            )
        inside = self.inward(x)
        flat = inside.reshape(-1, inside.shape[-1])
        shape = (*x.shape[:-1], routing.indices.shape[-1])
        weights, indices = (t.expand(shape).reshape(-1, shape[-1]) for t in (routing.weights, routing.indices))
        found = self.table(flat, weights, indices, self.activation).view(inside.shape)
        return self.outward(x, found)

    def inward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch width"]:
        """What the rows meet."""
        return x if self.project_in is None else self.project_in(x)

    def outward(
        self, x: Float[Tensor, "*batch d_in"], found: Float[Tensor, "*batch width"]
    ) -> Float[Tensor, "*batch d_out"]:
        """What becomes of the rows' sum: for a given `x` affine in `found`, so that each neuron's part has its own."""
        del x
        out = found if self.project_out is None else self.project_out(found)
        return out if self.out_bias is None else out + self.out_bias.to(out.dtype)
