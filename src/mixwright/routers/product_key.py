"""Retrieval among up to a million experts by product keys (Lample et al. 2019; He 2024, section 2.2)."""

from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mixwright.ops.product_key import coverage
from mixwright.ops.route import Routed, route
from mixwright.routers.base import WideBuffers
from mixwright.routers.query_norm import KeyNormName, QueryNormName, known, make_key_norm, make_query_norm
from mixwright.routers.remembered import version
from mixwright.routers.retriever import AbstractRetriever, Retrieval, counted_tokens
from mixwright.routing import Condition

GateName = Literal["softmax", "sigmoid", "relu", "renormalised", "one"]


class ProductKeyRouter(WideBuffers, AbstractRetriever):
    """w, ids = gate(top_k(<q, c_i> + <q', c'_j>)), for each of `heads` queries of a token (He 2024, Algorithm 1).

    `grid`: sub-keys on the two axes; expert (i, j) has the id i * n2 + j. `dim_key`: the width of a head's query, both
    halves together. `bias_first`, `bias_second`: added to the scores for the choice only; -inf keeps a sub-key out.
    `ablated` `(num_experts,)`: experts that are passed over, the next best in their places; None: nobody.
    `half_top_k`: only so many sub-keys of each half are candidates, where that is fewer than `top_k`. `separate_heads`:
    head h has experts of its own, whose ids begin at h * n1 * n2. Scores and gates are float32 or wider, under
    autocast too. `frozen_first`: so many leading sub-keys get no gradient. `extra`, `extra_gate`: slots of their
    own for sub-keys that were added, see `methods/peer/growth.py`. `always`: ids of experts that act on every token
    with a gate of 1, beside those that the first head finds; ablate them, or they may act twice.
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
        key_norm: KeyNormName = "none",
        share_keys: bool = True,
        query_bias: bool = False,
        *,
        half_top_k: int | None = None,
        separate_heads: bool = False,
    ) -> None:
        super().__init__()
        _check(d_in, grid, heads, top_k, dim_key, half_top_k)
        known("gate", gate, get_args(GateName))
        self.d_in, self.heads, self.top_k, self.dim_key = d_in, heads, top_k, dim_key
        self.grid: tuple[int, int] = (int(grid[0]), int(grid[1]))
        self.gate: GateName = gate
        self.half_top_k, self.separate_heads = half_top_k, separate_heads
        self.num_experts = self.grid[0] * self.grid[1] * (heads if separate_heads else 1)
        self.queries = nn.Linear(d_in, heads * dim_key, bias=query_bias)
        self.norm = make_query_norm(query_norm, heads, dim_key)
        key_heads, half = 1 if share_keys else heads, dim_key // 2
        self.frozen_first = 0
        self.norm_first, self.norm_second = make_key_norm(key_norm, half), make_key_norm(key_norm, half)
        self.keys_first = nn.Parameter(torch.empty(key_heads, self.grid[0], half))
        self.keys_second = nn.Parameter(torch.empty(key_heads, self.grid[1], half))
        for keys in (self.keys_first, self.keys_second):
            nn.init.uniform_(keys, -(half**-0.5), half**-0.5)  # as XLM's; the paper does not say
        self.bias_first: Tensor
        self.bias_second: Tensor
        self.ablated: Bool[Tensor, " experts"] | None
        self.extra: Tensor | None
        self.extra_gate: nn.Parameter | None
        self.register_buffer("bias_first", torch.zeros(key_heads, self.grid[0]))
        self.register_buffer("bias_second", torch.zeros(key_heads, self.grid[1]))
        self.register_buffer("ablated", None)
        self.register_buffer("extra", None)
        self.always: Int[Tensor, " always"] | None
        self.register_buffer("always", None)
        self.register_parameter("extra_gate", None)
        self._open: tuple[Tensor, int | None, int] | None = None

    @property
    def extra_slots(self) -> tuple[int, int] | None:
        """The first sub-key of the experts that have slots of their own, and how many slots a head has for them."""
        return None if self.extra is None else (int(self.extra[0]), int(self.extra[1]))

    def retrieve(
        self, x: Float[Tensor, "*batch d_in"], condition: Condition, *, top_k: int | None = None, detail: bool = False
    ) -> Retrieval:
        """What each head finds; with `detail` the measures too. Tokens that are masked out get gates of zero."""
        found = self.find(self.asked(x, condition), top_k=top_k, detail=detail)
        return found.counting(counted_tokens(x.shape[:-1], condition))

    def asked(self, x: Float[Tensor, "*batch d_in"], condition: Condition) -> Float[Tensor, "*batch heads 2 half"]:
        """The normalised queries; in training with batch norm, what counts as one batch is one call."""
        if x.shape[-1] != self.d_in:
            raise ValueError(f"x has width {x.shape[-1]} on its last axis; this router was built for {self.d_in}.")
        counted = counted_tokens(x.shape[:-1], condition)
        with torch.autocast(x.device.type, enabled=False):
            flat = self.queries(x.reshape(-1, self.d_in).to(self.queries.weight.dtype))
            flat = wide(flat).unflatten(-1, (self.heads, self.dim_key))
            queries = self.norm(flat, None if counted is None else counted.reshape(-1))
        return queries.view(*x.shape[:-1], self.heads, 2, self.dim_key // 2)

    def find(
        self, queries: Float[Tensor, "*batch heads 2 half"], *, top_k: int | None = None, detail: bool = False
    ) -> Retrieval:
        """What is retrieved for queries that are normalised already."""
        shape, k = queries.shape[:-3], self.top_k if top_k is None else top_k
        if not 1 <= k <= self.grid[0] * self.grid[1]:
            raise ValueError(
                f"top_k={k}: expected 1 to {self.grid[0] * self.grid[1]}, the experts that a head can find."
            )
        flat = queries.reshape(-1, *queries.shape[-3:])
        with torch.autocast(flat.device.type, enabled=False):
            first, second = self._keys()
            best = self._search(flat, first, second, k, detail=detail)
            scores, gates, indices = best.scores, self._gates(best.scores, k), best.indices
            if self.always is not None:
                scores, gates, indices = self._beside(self.always, scores, gates, indices)
            parts = (scores, gates, indices, *best[2:])
        return Retrieval(*(None if t is None else t.view(*shape, *t.shape[1:]) for t in parts))  # type: ignore[arg-type]

    def half_scores(
        self, x: Float[Tensor, "*batch d_in"], condition: Condition
    ) -> tuple[Float[Tensor, "*batch heads n1"], Float[Tensor, "*batch heads n2"]]:
        """The scores of all sub-keys of each axis, without biases."""
        queries = self.asked(x, condition).reshape(-1, self.heads, 2, self.dim_key // 2)
        with torch.autocast(x.device.type, enabled=False):
            first, second = self._half_scores(queries, *self._keys())
        return first.view(*x.shape[:-1], *first.shape[1:]), second.view(*x.shape[:-1], *second.shape[1:])

    def _keys(self) -> tuple[Tensor, Tensor]:
        """The sub-keys as they are compared."""
        first, second = wide(self.keys_first), wide(self.keys_second)
        if self.frozen_first and torch.is_grad_enabled():
            first = torch.cat([first[:, : self.frozen_first].detach(), first[:, self.frozen_first :]], 1)
        return (
            first if self.norm_first is None else self.norm_first(first),
            second if self.norm_second is None else self.norm_second(second),
        )

    def _half_scores(self, queries: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        cut = self._settled()
        scores = _scores(queries[:, :, 0], first[:, :cut])
        if cut < self.grid[0]:  # by themselves: a product of another size is rounded in another way
            scores = torch.cat([scores, _scores(queries[:, :, 0], first[:, cut:])], -1)
        return scores, _scores(queries[:, :, 1], second)

    def _settled(self) -> int:
        """How many leading sub-keys of the first axis are not new: what is new is behind, and kept out."""
        if self.extra is not None:
            return int(self.extra[0])
        if torch.compiler.is_compiling():
            return self.grid[0]
        bias, seen = self.bias_first, self._open
        if seen is None or seen[0] is not bias or seen[1] is None or seen[1] != version(bias):
            kept = (bias > -torch.inf).any(0).nonzero()
            seen = self._open = (bias, version(bias), int(kept[-1]) + 1 if len(kept) else self.grid[0])
        return seen[2]

    def _search(self, queries: Tensor, first: Tensor, second: Tensor, k: int, *, detail: bool) -> "_Found":
        """The best experts of each token and head. New sub-keys, behind, are left off while nobody may choose them."""
        slots, cut = self.extra_slots, self._settled()
        if slots is None and k > cut * self.grid[1]:
            cut = self.grid[0]
        best = self._choose(queries, first, second, slice(cut), k, detail=detail)
        if slots is not None:
            added = self._choose(queries, first, second, slice(cut, None), slots[1])
            scores, indices = (torch.cat(pair, -1) for pair in zip(best[:2], added[:2], strict=True))
            best = _Found(scores, indices, *best[2:])
        return best

    def _choose(
        self, queries: Tensor, first: Tensor, second: Tensor, part: slice, k: int, *, detail: bool = False
    ) -> "_Found":
        """The k best with global ids among the experts of some sub-keys of the first axis."""
        first, bias_first, bias_second = first[:, part], self.bias_first[:, part], self.bias_second
        biases = [bias.to(queries.dtype) for bias in (bias_first, bias_second)]
        most, start = first.shape[1] * second.shape[1], (part.start or 0) * second.shape[1]
        wanted = min(k + detail, max(k, most))
        while True:
            found = route(queries, first, second, wanted, *biases, half_top_k=self.half_top_k, whole=detail)
            indices = found.indices + start if start else found.indices
            if self.separate_heads:
                indices = indices + self._offset(indices)
            if self.ablated is None:
                return _measured(found._replace(indices=indices), k)
            live = ~self.ablated[indices]
            if wanted == most or bool((live.sum(-1) >= min(k + detail, most)).all()):
                break
            wanted = min(most, 2 * wanted)
        order = (~live).long().argsort(dim=-1, stable=True)[..., : k + detail]
        live, scores, indices = (t.gather(-1, order) for t in (live, found.scores, indices))
        indices = torch.where(live, indices, indices[..., :1])
        return _measured(found._replace(scores=scores.masked_fill(~live, -torch.inf), indices=indices), k)

    def _offset(self, indices: Tensor) -> Tensor:
        """Where the ids of each head begin."""
        return torch.arange(self.heads, device=indices.device)[:, None] * (self.grid[0] * self.grid[1])

    def _beside(self, always: Tensor, scores: Tensor, gates: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The experts that always act, in places of their own after what was found; their scores are told as 0."""
        ids = always.expand(*indices.shape[:-1], -1)
        on = gates.new_zeros(ids.shape)
        on[..., 0, :] = 1.0
        return (
            torch.cat([scores, scores.new_zeros(ids.shape)], -1),
            torch.cat([gates, on], -1),
            torch.cat([indices, ids], -1),
        )

    def _gates(self, scores: Tensor, k: int) -> Tensor:
        if self.extra_gate is None:
            return _gate(self.gate, scores)
        old, new = _gate(self.gate, scores[..., :k]), _gate(self.gate, scores[..., k:])
        return torch.cat([old, new * self.extra_gate.to(new.dtype)[:, None]], -1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """What growth and ablation added is taken over from the state, more sub-keys on the first axis included."""
        keys = state_dict.get(f"{prefix}keys_first")
        if isinstance(keys, Tensor) and keys.dim() == 3 and keys.shape[1] > self.grid[0] and not self.separate_heads:
            self.widen(self.keys_first.new_zeros(keys.shape[0], keys.shape[1] - self.grid[0], keys.shape[2]))
        for name in ("ablated", "extra", "always"):
            held = state_dict.get(f"{prefix}{name}")
            if isinstance(held, Tensor) and getattr(self, name) is None:
                self.register_buffer(name, torch.zeros_like(held, device=self.keys_first.device))
        if f"{prefix}extra_gate" in state_dict and self.extra_gate is None:
            self.extra_gate = nn.Parameter(self.keys_first.new_zeros(self.heads))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @torch.no_grad()
    def widen(self, more: Float[Tensor, "key_heads new half"]) -> None:
        """More sub-keys on the first axis, kept out by a bias of -inf; the parameter stays the same object."""
        keys, bias, sub_keys = self.keys_first, self.bias_first, more.shape[1]
        keys.data = torch.cat([keys.data, more.to(keys)], 1)
        keys.grad = None
        self.bias_first = torch.cat([bias, bias.new_full((bias.shape[0], sub_keys), -torch.inf)], 1)
        self.grid = (self.grid[0] + sub_keys, self.grid[1])
        self.num_experts = self.grid[0] * self.grid[1]
        if self.ablated is not None:
            self.ablated = torch.cat([self.ablated, self.ablated.new_zeros(sub_keys * self.grid[1])])


class _Found(NamedTuple):
    scores: Tensor
    indices: Tensor
    coverage: Tensor | None
    entropy: Tensor | None
    margin: Tensor | None


def wide(tensor: Tensor) -> Tensor:
    """In float32, or float64 where it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    """`(tokens, heads, half)` by `(key_heads, n, half)`."""
    if keys.shape[0] == 1:
        return queries @ keys[0].mT.to(queries.dtype)
    return torch.einsum("thd,hnd->thn", queries, keys.to(queries.dtype))


def _gate(kind: GateName, scores: Tensor) -> Tensor:
    """One head's gates of its retrieved scores; zero where the score is -inf, everywhere if need be."""
    out = ~(scores > -torch.inf)
    scores = scores.masked_fill(out, torch.finfo(scores.dtype).min)
    if kind == "softmax":
        gates = scores.softmax(-1)
    elif kind == "relu":
        gates = scores.relu()
    elif kind == "one":
        gates = torch.ones_like(scores)
    else:
        gates = scores.sigmoid()
        if kind == "renormalised":
            gates = gates / gates.sum(-1, keepdim=True).clamp_min(torch.finfo(gates.dtype).tiny)
    return gates.masked_fill(out, 0.0)


def _measured(found: Routed, k: int) -> _Found:
    """The k best of what was found, with the measures where the sums for them are there.

    Sub-keys that are kept out do not count; the margin is infinite where nobody is left.
    """
    scores, indices = found.scores[..., :k], found.indices[..., :k]
    if found.log_partition is None or found.entropy is None:
        return _Found(scores, indices, None, None, None)
    held = found.scores.detach()
    left = held[..., k] if held.shape[-1] > k else torch.full_like(held[..., 0], -torch.inf)
    margin = torch.where(left == -torch.inf, torch.inf, held[..., k - 1] - left)
    return _Found(scores, indices, coverage(held[..., :k], found.log_partition), found.entropy, margin)


def _check(d_in: int, grid: tuple[int, int], heads: int, top_k: int, dim_key: int, half_top_k: int | None) -> None:
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"grid={grid}: expected two numbers of sub-keys, (n1, n2), each at least 1.")
    for name, value in (("d_in", d_in), ("heads", heads)):
        if value < 1:
            raise ValueError(f"{name}={value}; expected at least 1.")
    if dim_key < 2 or dim_key % 2:
        raise ValueError(f"dim_key={dim_key}: a query is two halves, so its width is even and at least 2.")
    if not 1 <= top_k <= grid[0] * grid[1]:
        raise ValueError(
            f"top_k={top_k}, but a grid of {grid[0]} x {grid[1]} has {grid[0] * grid[1]} experts; choose "
            f"1 <= top_k <= {grid[0] * grid[1]}."
        )
    if half_top_k is not None and not (
        half_top_k >= 1 and min(half_top_k, grid[0]) * min(half_top_k, grid[1]) >= top_k
    ):
        raise ValueError(
            f"half_top_k={half_top_k} leaves fewer than top_k={top_k} pairs of sub-keys; choose it larger."
        )
