"""PEER as a layer: y = x + layer(x)."""

import math
from typing import cast

from jaxtyping import Bool, Float
from torch import Tensor, nn

from mixwright.experts.neuron import NeuronExperts
from mixwright.experts.table import NeuronTable, initial_rows
from mixwright.ops.neuron import Activation
from mixwright.routers.product_key import GateName, ProductKeyRouter
from mixwright.routers.query_norm import QueryNormName
from mixwright.routing import Condition


class PEER(nn.Module):
    """f(x) = sum over heads and retrieved experts of g e(x), e(x) = act(<u, x>) v (He 2024, section 2, Algorithm 1).

    `num_experts`: a square number N, or a grid (n1, n2) of sub-keys.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int | tuple[int, int] = 1024 * 1024,
        *,
        heads: int = 8,
        top_k: int = 16,
        dim_key: int = 256,
        gate: GateName = "softmax",
        query_norm: QueryNormName = "batch",
        share_keys: bool = True,
        activation: Activation = "gelu",
        gated: bool = False,
        row_dim: int | None = None,
    ) -> None:
        super().__init__()
        grid = (math.isqrt(num_experts),) * 2 if isinstance(num_experts, int) else num_experts
        if isinstance(num_experts, int) and grid[0] ** 2 != num_experts:
            raise ValueError(f"num_experts={num_experts} is no square; give a grid (n1, n2).")
        self.router = ProductKeyRouter(
            dim, cast(tuple[int, int], grid), heads, top_k, dim_key, gate, query_norm, share_keys
        )
        width = row_dim or dim
        out_std = (heads * top_k) ** -0.5
        table = NeuronTable(initial_rows(self.router.num_experts, 3 if gated else 2, width, out_std))
        narrow = row_dim is not None
        self.experts = NeuronExperts(
            table,
            activation,
            nn.Linear(dim, width, bias=False) if narrow else None,
            nn.Linear(width, dim, bias=False) if narrow else None,
        )

    def forward(
        self, x: Float[Tensor, "*batch dim"], token_mask: Bool[Tensor, "*batch"] | None = None
    ) -> Float[Tensor, "*batch dim"]:
        """The retrieved experts' sum; tokens that are masked out get zero."""
        condition = Condition(token_mask=token_mask)
        return self.experts(x, self.router(x, condition), condition)
