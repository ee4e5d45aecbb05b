"""A dense layer beside experts, as one expert more: it works on the tokens that lean on it, and on no others."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixwright.experts.base import AbstractExperts
from mixwright.ops.neuron import Activation, activate
from mixwright.routing import Condition, Routing


class DenseBranch(AbstractExperts):
    """y = sum_e w_e f_e(x) + w_N dense(x), where N, the id after those of `experts`, is the dense branch.

    The routing names the branch in its last place, and nowhere else.
    """

    def __init__(self, experts: AbstractExperts, dense: nn.Module) -> None:
        super().__init__()
        self.experts, self.dense = experts, dense

    @property
    def num_experts(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]  (the experts may grow)
        """The experts and the branch."""
        return self.experts.num_experts + 1

    def forward(
        self, x: Float[Tensor, "*batch d_in"], routing: Routing, condition: Condition
    ) -> Float[Tensor, "*batch d_out"]:
        """The experts' sum, and the dense layer's output for tokens whose weight for it is not zero."""
        if routing.indices is None or routing.num_experts != self.num_experts:
            raise ValueError(
                f"a dense branch is expert {self.num_experts - 1} of {self.num_experts}, in the last place of a "
                f"routing with indices; this one is of {routing.num_experts} experts. Use a LeaningRouter."
            )
        rest = replace(
            routing,
            weights=routing.weights[..., :-1],
            indices=routing.indices[..., :-1],
            num_experts=self.num_experts - 1,
        )
        out = self.experts(x, rest, condition)
        share = routing.weights[..., -1].expand(x.shape[:-1])
        leaning = share != 0
        if not bool(leaning.any()):
            return out
        added = self.dense(x[leaning]) * share[leaning][:, None].to(x.dtype)
        return out.index_put((leaning,), added.to(out.dtype), accumulate=True)


class DenseNeurons(nn.Module):
    """sum_n act(<u_n, x> + b_n) v_n + c: a feed-forward layer held as rows, `(neurons, parts, width)`; all of them act.

    Rows and `bias` are as those of a table.
    """

    def __init__(
        self,
        rows: Float[Tensor, "neurons parts width"],
        activation: Activation = "gelu",
        bias: Float[Tensor, "neurons inputs"] | None = None,
        out_bias: Float[Tensor, " width"] | None = None,
    ) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.out_bias = None if out_bias is None else nn.Parameter(out_bias)
        self.activation: Activation = activation

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Every neuron acts."""
        before = torch.einsum("...d,npd->...np", x, self.rows[:, :-1].to(x.dtype))
        before = before if self.bias is None else before + self.bias.to(x.dtype)
        out = activate(before, self.activation) @ self.rows[:, -1].to(x.dtype)
        return out if self.out_bias is None else out + self.out_bias.to(out.dtype)
