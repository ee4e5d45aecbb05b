"""From queries to retrieved experts, a few tokens at a time: the scores of all sub-keys are never there as a whole.

Scores of one head and half for a few tokens are one matrix product into a buffer that stays in the cache, from which
the best are taken before the next head overwrites it. Backward touches only the retrieved sub-keys.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mixwright.ops import kernels
from mixwright.ops.gpu import best_keys
from mixwright.ops.product_key import (
    check_top_k,
    entropy,
    log_partition,
    only_best,
    plain_floats,
    product_key_top_k,
    top_k_into,
)
from mixwright.ops.selected_scores import selected_gradients, selected_scores

BUFFER = 1 << 18
"""Scores that are held at once: 1 MB."""

FEW = 16
"""Queries of a sub-key for which one call for everything is quicker than a product for each head and half."""


class Routed(NamedTuple):
    """`scores` and ids as `ProductKeys`; `log_partition` and `entropy` `(tokens, heads)` over all experts, if asked."""

    scores: Tensor
    indices: Tensor
    log_partition: Tensor | None = None
    entropy: Tensor | None = None


class _Keys(NamedTuple):
    """What is alike for every token: sub-keys `(key_heads, n, half)` and biases `(key_heads, n)`."""

    first: Tensor
    second: Tensor
    first_bias: Tensor | None
    second_bias: Tensor | None
    half_top_k: int | None

    def of(self, head: int) -> "_Keys":
        """Those of one head, all of them still with a leading axis."""
        one = slice(head, head + 1)
        return _Keys(*(None if t is None else t[one] for t in self[:4]), self.half_top_k)  # type: ignore[arg-type]


def route(
    queries: Float[Tensor, "tokens heads 2 half"],
    first: Float[Tensor, "key_heads n1 half"],
    second: Float[Tensor, "key_heads n2 half"],
    k: int,
    first_bias: Float[Tensor, "key_heads n1"] | None = None,
    second_bias: Float[Tensor, "key_heads n2"] | None = None,
    *,
    half_top_k: int | None = None,
    whole: bool = False,
) -> Routed:
    """The k experts of each head with the largest <q, c_i> + <q', c'_j>, `(tokens, heads, k)`; ids are i * n2 + j.

    `key_heads` is 1 where heads share their sub-keys. Biases count for the choice only; ties go to the lowest id.
    With `half_top_k` only so many sub-keys of each half are candidates. Scores are float32 at least, and
    differentiable. With `whole` come sums over all experts that no bias of -inf keeps out. Raises ValueError unless
    1 <= k <= n1 * n2.
    """
    check_top_k(k, first.shape[1], second.shape[1])
    limit = half_top_k if half_top_k is not None and half_top_k < k else None
    biases = [None if bias is None or _is_nothing(bias) else bias.detach() for bias in (first_bias, second_bias)]
    with torch.autocast(queries.device.type, enabled=False):
        if torch.compiler.is_compiling():
            return _in_one(queries, _Keys(first, second, biases[0], biases[1], limit), k, whole)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (queries, first, second)):
            return Routed(*_Route.apply(queries, first, second, *biases, limit, k, whole))
        return _route(queries, _Keys(first, second, biases[0], biases[1], limit), k, whole)


def _is_nothing(bias: Tensor) -> bool:
    return bias.is_cpu and not torch.compiler.is_compiling() and not bias.any()


def _route(queries: Tensor, keys: _Keys, k: int, whole: bool) -> Routed:
    by_triton = best_keys(queries, *keys[:2], k, *keys[2:4]) if keys.half_top_k is None else None
    if by_triton is not None:
        return Routed(*by_triton) if whole else Routed(*by_triton[:2])
    tokens, heads = queries.shape[:2]
    given = [t for t in (queries, *keys[:4]) if isinstance(t, Tensor)]
    native = kernels.kernel() if plain_floats(*given) and tokens * heads else None
    dtype = torch.promote_types(queries.dtype, torch.float32)
    measures = [queries.new_empty(tokens, heads, dtype=dtype) if whole else None for _ in range(2)]
    ids = queries.new_empty(tokens, heads, k, dtype=torch.int64)
    found = Routed(queries.new_empty(tokens, heads, k, dtype=dtype), ids, *measures)
    lie_whole = keys.first[0].is_contiguous() and keys.second[0].is_contiguous()
    if native is not None and tokens * heads <= FEW * len(keys.first) and lie_whole and keys.half_top_k is None:
        _few(native, found, queries.contiguous(), keys)
    elif native is None and len(keys.first) > 1 and _level(found, queries, keys):
        pass
    elif len(keys.first) > 1:
        for head in range(heads):
            _plane(native, found, slice(head, head + 1), queries, keys.of(head))
    else:
        _plane(native, found, slice(0, heads), queries, keys)
    return found


def _plane(native: kernels.Kernels | None, found: Routed, heads: slice, queries: Tensor, keys: _Keys) -> None:
    """Fill in what is found for heads that have the same sub-keys, in pieces."""
    dtype, width = found.scores.dtype, heads.stop - heads.start
    axes = [axis[0].to(dtype) for axis in keys[:2]]
    step = max(1, BUFFER // (sum(map(len, axes)) * width))
    rows = min(step, len(queries)) * width
    buffers = [queries.new_empty(rows, len(axis), dtype=dtype) for axis in axes]
    for token in range(0, len(queries), step):
        some = queries[token : token + step, heads].to(dtype)
        flat = [some[:, :, side].reshape(-1, some.shape[-1]) for side in (0, 1)]
        halves = [torch.mm(q, axis.mT, out=to[: len(q)]) for q, axis, to in zip(flat, axes, buffers)]
        mine = [None if whole is None else whole[token : token + step, heads].flatten(0, 1) for whole in found]
        _choose(native, Routed(*mine), halves[0], halves[1], keys)  # type: ignore[arg-type]


def _level(found: Routed, queries: Tensor, keys: _Keys) -> bool:
    """Fill in few tokens of all heads at once, whose time is that of calling torch; False for what is not like that."""
    (tokens, heads), count = queries.shape[:2], keys.first.shape[1] + keys.second.shape[1]
    if keys.first_bias is not None or keys.second_bias is not None or tokens * heads * count > BUFFER:
        return False
    by_head = queries.to(found.scores.dtype).transpose(0, 1)
    halves = [
        torch.bmm(by_head[:, :, side], axis.to(by_head.dtype).mT).transpose(0, 1).flatten(0, 1)
        for side, axis in enumerate(keys[:2])
    ]
    whole = [None if one is None else one.flatten(0, 1) for one in found]
    _choose(None, Routed(*whole), halves[0], halves[1], keys)  # type: ignore[arg-type]
    return True


def _choose(native: kernels.Kernels | None, found: Routed, first: Tensor, second: Tensor, keys: _Keys) -> None:
    """Fill in rows from their scores."""
    if native is not None and keys.half_top_k is None:
        top_k_into(native, found.scores, found.indices, first, second, keys.first_bias, keys.second_bias)
    else:
        best = product_key_top_k(first, second, found.scores.shape[1], *_limited(first, second, keys))
        found.scores.copy_(best.scores)
        found.indices.copy_(best.indices)
    _measure(found, first, second, keys)


def _limited(first: Tensor, second: Tensor, keys: _Keys) -> list[Tensor | None]:
    """The biases; with `half_top_k` they leave only so many sub-keys of each row."""
    biases: list[Tensor | None] = [keys.first_bias, keys.second_bias]
    if keys.half_top_k is None:
        return biases
    return [only_best(half, bias, keys.half_top_k) for half, bias in zip((first, second), biases)]


def _measure(found: Routed, first: Tensor, second: Tensor, keys: _Keys) -> None:
    """Fill in the sums over all, without sub-keys that are kept out; `first` and `second` are of as many axes."""
    if found.log_partition is None or found.entropy is None:
        return
    first, second = (
        half if bias is None else half.masked_fill(bias == -torch.inf, -torch.inf)
        for half, bias in ((first, keys.first_bias), (second, keys.second_bias))
    )
    found.log_partition.copy_(log_partition(first, second))
    found.entropy.copy_(entropy(first, second))


def _few(native: kernels.Kernels, found: Routed, queries: Tensor, keys: _Keys) -> None:
    """All in one call, each sub-key read once."""
    (tokens, heads, _, half), n1, n2 = queries.shape, keys.first.shape[1], keys.second.shape[1]
    held = 4 if found.entropy is None else (tokens + 3) // 4 * 4
    room = queries.new_empty(heads * held * (n1 + n2))
    biases = [None if bias is None else bias.contiguous() for bias in keys[2:4]]
    given = (found.scores, found.indices, room, queries, keys.first, keys.second, *biases)
    failed = native.route_few(
        *(0 if t is None else t.data_ptr() for t in given),
        *(tokens, heads, len(keys.first), keys.first.stride(0), keys.second.stride(0), held),
        *(n1, n2, half, found.scores.shape[-1]),
    )
    if failed:
        raise MemoryError(f"no memory for the {found.scores.shape[-1]} best of a row of {n1}")
    halves = room.split([heads * held * n1, heads * held * n2])
    first, second = (side.view(heads, held, -1)[:, :tokens].transpose(0, 1) for side in halves)
    _measure(found, first, second, keys)


def _in_one(queries: Tensor, keys: _Keys, k: int, whole: bool) -> Routed:
    """The same in one piece, as a compiler wants it."""
    dtype = torch.promote_types(queries.dtype, torch.float32)
    queries, axes = queries.to(dtype), [axis.to(dtype) for axis in keys[:2]]
    how = "thd,hnd->thn" if len(keys.first) > 1 else "thd,ond->thn"
    halves = [torch.einsum(how, queries[:, :, side], axis).detach() for side, axis in enumerate(axes)]
    best = product_key_top_k(halves[0], halves[1], k, *_limited(halves[0], halves[1], keys))
    scores = selected_scores(queries, axes[0], axes[1], best.indices)
    found = Routed(scores.masked_fill(best.scores == -torch.inf, -torch.inf), best.indices)
    if whole:
        found = found._replace(
            log_partition=scores.new_empty(scores.shape[:2]), entropy=scores.new_empty(scores.shape[:2])
        )
        _measure(found, halves[0], halves[1], keys)
    return found


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        first: Tensor,
        second: Tensor,
        first_bias: Tensor | None,
        second_bias: Tensor | None,
        half_top_k: int | None,
        k: int,
        whole: bool,
    ) -> Routed:
        found = _route(queries, _Keys(first, second, first_bias, second_bias, half_top_k), k, whole)
        ctx.save_for_backward(queries, first, second, found.indices)
        ctx.mark_non_differentiable(*(t for t in found[1:] if t is not None))
        return found

    @staticmethod
    def backward(ctx: Any, d_scores: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  (nobody passes ctx by name)
        *given, indices = ctx.saved_tensors  # once: a checkpoint computes them anew
        queries, first, second = (t.to(d_scores.dtype).contiguous() for t in given)
        wanted: tuple[bool, bool, bool] = ctx.needs_input_grad[:3]
        found = selected_gradients(d_scores, queries, first, second, indices, wanted)
        cast = [None if gradient is None else gradient.to(t.dtype) for gradient, t in zip(found, given)]
        return *cast, None, None, None, None, None
