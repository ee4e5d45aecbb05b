"""Retrieval among up to a million experts by product keys (Lample et al. 2019; He 2024, section 2.2)."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixwright.ops.product_key import coverage, entropy, log_partition, product_key_top_k
from mixwright.ops.selected_scores import selected_scores
from mixwright.routers.query_norm import QueryNormName, make_query_norm
from mixwright.routers.retriever import AbstractRetriever, Retrieval, counted_tokens
from mixwright.routing import Condition

GateName = Literal["softmax", "sigmoid", "relu", "renormalised", "one"]


class ProductKeyRouter(AbstractRetriever):
    """w, ids = gate(top_k(<q, c_i> + <q', c'_j>)), for each of `heads` queries of a token (He 2024, Algorithm 1).

    `grid`: sub-keys on the two axes; expert (i, j) has the id i * n2 + j. `dim_key`: the width of a head's query, both
    halves together. `bias_first`, `bias_second`: added to the scores for the choice only; -inf keeps a sub-key out.
    """

    def __init__(
        self,
        d_in: int,
        grid: tuple[int, int],
        heads: int = 8,
        top_k: int = 16,
        dim_key: int = 256,
        gate: GateName = "softmax",
        query_norm: QueryNormName = "batch",
        share_keys: bool = True,
        query_bias: bool = False,
    ) -> None:
        super().__init__()
        self.grid, self.heads, self.top_k, self.dim_key, self.gate = grid, heads, top_k, dim_key, gate
        self.num_experts = grid[0] * grid[1]
        self.queries = nn.Linear(d_in, heads * dim_key, bias=query_bias)
        self.norm = make_query_norm(query_norm, heads, dim_key)
        key_heads, half = 1 if share_keys else heads, dim_key // 2
        self.keys_first = nn.Parameter(torch.randn(key_heads, grid[0], half) * half**-0.5)
        self.keys_second = nn.Parameter(torch.randn(key_heads, grid[1], half) * half**-0.5)
        self.bias_first: Tensor
        self.bias_second: Tensor
        self.register_buffer("bias_first", torch.zeros(key_heads, grid[0]))
        self.register_buffer("bias_second", torch.zeros(key_heads, grid[1]))

    def retrieve(
        self, x: Float[Tensor, "*batch d_in"], condition: Condition, *, top_k: int | None = None, detail: bool = False
    ) -> Retrieval:
        """What each head finds; with `detail` the measures too. Tokens that are masked out get gates of zero."""
        found = self.find(self.asked(x, condition), top_k=top_k, detail=detail)
        return found.counting(counted_tokens(x.shape[:-1], condition))

    def asked(self, x: Float[Tensor, "*batch d_in"], condition: Condition) -> Float[Tensor, "*batch heads 2 half"]:
        """The normalised queries; in training with batch norm, what counts as one batch is one call."""
        counted = counted_tokens(x.shape[:-1], condition)
        queries = self._queries(x.reshape(-1, x.shape[-1]), None if counted is None else counted.reshape(-1))
        return queries.view(*x.shape[:-1], *queries.shape[1:])

    def find(
        self, queries: Float[Tensor, "*batch heads 2 half"], *, top_k: int | None = None, detail: bool = False
    ) -> Retrieval:
        """What is retrieved for queries that are normalised already."""
        shape, k = queries.shape[:-3], top_k or self.top_k
        flat = queries.reshape(-1, *queries.shape[-3:])
        with torch.no_grad():
            first, second = self._half_scores(flat)
            indices = product_key_top_k(first, second, k, self.bias_first, self.bias_second).indices
        scores = selected_scores(flat, self.keys_first.float(), self.keys_second.float(), indices)
        measures = self._measures(first, second, scores, k) if detail else (None, None, None)
        parts = (scores, self._gates(scores), indices, *measures)
        return Retrieval(*(None if t is None else t.view(*shape, *t.shape[1:]) for t in parts))  # type: ignore[arg-type]

    def half_scores(
        self, x: Float[Tensor, "*batch d_in"], condition: Condition
    ) -> tuple[Float[Tensor, "*batch heads n1"], Float[Tensor, "*batch heads n2"]]:
        """The scores of all sub-keys of each axis."""
        first, second = self._half_scores(self.asked(x, condition).reshape(-1, self.heads, 2, self.dim_key // 2))
        return first.view(*x.shape[:-1], *first.shape[1:]), second.view(*x.shape[:-1], *second.shape[1:])

    def _queries(self, x: Tensor, counted: Tensor | None) -> Tensor:
        flat = self.queries(x).float().unflatten(-1, (self.heads, self.dim_key))
        return self.norm(flat, counted).unflatten(-1, (2, self.dim_key // 2))

    def _half_scores(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        how = "thd,hnd->thn" if self.keys_first.shape[0] > 1 else "thd,ond->thn"
        first = torch.einsum(how, queries[:, :, 0], self.keys_first.float())
        return first, torch.einsum(how, queries[:, :, 1], self.keys_second.float())

    def _gates(self, scores: Tensor) -> Tensor:
        if self.gate == "softmax":
            return scores.softmax(-1)
        if self.gate == "relu":
            return scores.relu()
        if self.gate == "one":
            return torch.ones_like(scores)
        gates = scores.sigmoid()
        return gates if self.gate == "sigmoid" else gates / gates.sum(-1, keepdim=True)

    def _measures(self, first: Tensor, second: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        first, second = (
            half.masked_fill(bias == -torch.inf, -torch.inf)
            for half, bias in ((first, self.bias_first), (second, self.bias_second))
        )
        one_more = product_key_top_k(first, second, min(k + 1, self.num_experts), self.bias_first, self.bias_second)
        return (
            coverage(scores.detach(), log_partition(first, second)),
            entropy(first, second),
            scores.detach()[..., -1] - one_more.scores[..., -1],
        )
