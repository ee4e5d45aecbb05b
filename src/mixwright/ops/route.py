"""From queries to retrieved experts, a few tokens at a time: the scores of all sub-keys are never there as a whole.

Scores of one head and half for a few tokens are one matrix product into a buffer that stays in the cache, from which
the best are taken before the next head overwrites it. Backward touches only the retrieved sub-keys.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mixwright.ops import kernels
from mixwright.ops.product_key import ProductKeys, check_top_k, plain_floats, product_key_top_k, top_k_into
from mixwright.ops.selected_scores import selected_gradients

BUFFER = 1 << 18
"""Scores that are held at once: 1 MB."""

FEW = 16
"""Queries of a sub-key for which one call for everything is quicker than a product for each head and half."""


def route(
    queries: Float[Tensor, "tokens heads 2 half"],
    first: Float[Tensor, "key_heads n1 half"],
    second: Float[Tensor, "key_heads n2 half"],
    k: int,
    first_bias: Float[Tensor, "key_heads n1"] | None = None,
    second_bias: Float[Tensor, "key_heads n2"] | None = None,
) -> ProductKeys:
    """The k experts of each head with the largest <q, c_i> + <q', c'_j>, `(tokens, heads, k)`; ids are i * n2 + j.

    `key_heads` is 1 where heads share their sub-keys. Biases count for the choice only; ties go to the lowest id.
    Scores are float32 at least, and differentiable. Raises ValueError unless 1 <= k <= n1 * n2.
    """
    check_top_k(k, first.shape[1], second.shape[1])
    biases = tuple(None if bias is None or (bias.is_cpu and not bias.any()) else bias for bias in (first_bias, second_bias))
    if torch.is_grad_enabled() and any(t.requires_grad for t in (queries, first, second)):
        return ProductKeys(*_Route.apply(queries, first, second, k, *biases))
    return _route(queries, first, second, k, *biases)


def _route(
    queries: Tensor, first: Tensor, second: Tensor, k: int, first_bias: Tensor | None, second_bias: Tensor | None
) -> ProductKeys:
    tokens, heads = queries.shape[:2]
    with torch.autocast(queries.device.type, enabled=False):
        given = [t for t in (queries, first, second, first_bias, second_bias) if t is not None]
        native = kernels.kernel() if plain_floats(*given) and tokens * heads else None
        if native is not None and tokens * heads <= FEW * len(first) and _lie_whole(first, second):
            return _few(native, queries, first, second, k, first_bias, second_bias)
        dtype = torch.promote_types(queries.dtype, torch.float32)
        scores = queries.new_empty(tokens, heads, k, dtype=dtype)
        found = ProductKeys(scores, queries.new_empty(tokens, heads, k, dtype=torch.int64))
        if len(first) > 1:
            for head in range(heads):
                biases = [None if bias is None else bias[head : head + 1] for bias in (first_bias, second_bias)]
                _plane(native, found, slice(head, head + 1), queries, first[head], second[head], *biases)
        else:
            _plane(native, found, slice(0, heads), queries, first[0], second[0], first_bias, second_bias)
    return found


def _plane(
    native: kernels.Kernels | None,
    found: ProductKeys,
    heads: slice,
    queries: Tensor,
    first: Tensor,
    second: Tensor,
    first_bias: Tensor | None,
    second_bias: Tensor | None,
) -> None:
    """Fill in what is found for heads that have the same sub-keys `(n, half)`."""
    dtype, width = found.scores.dtype, heads.stop - heads.start
    keys = [axis.to(dtype).mT for axis in (first, second)]
    step = max(1, BUFFER // ((len(first) + len(second)) * width))
    rows = min(step, len(queries)) * width
    buffers = [queries.new_empty(rows, len(axis), dtype=dtype) for axis in (first, second)]
    for token in range(0, len(queries), step):
        some = queries[token : token + step, heads].to(dtype)
        flat = [some[:, :, half].reshape(-1, some.shape[-1]) for half in (0, 1)]
        halves = [torch.mm(q, key, out=to[: len(q)]) for q, key, to in zip(flat, keys, buffers)]
        scores, ids = (whole[token : token + step, heads].flatten(0, 1) for whole in found)
        if native is not None:
            top_k_into(native, scores, ids, halves[0], halves[1], first_bias, second_bias)
        else:
            best = product_key_top_k(halves[0], halves[1], scores.shape[1], first_bias, second_bias)
            scores.copy_(best.scores)
            ids.copy_(best.indices)


def _few(
    native: kernels.Kernels,
    queries: Tensor,
    first: Tensor,
    second: Tensor,
    k: int,
    first_bias: Tensor | None,
    second_bias: Tensor | None,
) -> ProductKeys:
    """All in one call, each sub-key read once."""
    (tokens, heads, _, half), n1, n2 = queries.shape, first.shape[1], second.shape[1]
    scores, ids = queries.new_empty(tokens, heads, k), queries.new_empty(tokens, heads, k, dtype=torch.int64)
    room = queries.new_empty(heads * 4 * (n1 + n2))
    biases = [None if bias is None else bias.contiguous() for bias in (first_bias, second_bias)]
    given = (scores, ids, room, queries.contiguous(), first, second, *biases)
    failed = native.route_few(
        *(0 if t is None else t.data_ptr() for t in given),
        *(tokens, heads, len(first), first.stride(0), second.stride(0)),
        *(n1, n2, half, k),
    )
    if failed:
        raise MemoryError(f"no memory for the {k} best of a row of {n1}")
    return ProductKeys(scores, ids)


def _lie_whole(*keys: Tensor) -> bool:
    """Whether the sub-keys of a head are in one piece."""
    return all(axis[0].is_contiguous() for axis in keys)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, first: Tensor, second: Tensor, k: int, *biases: Tensor | None) -> ProductKeys:
        found = _route(queries, first, second, k, *biases)
        ctx.save_for_backward(queries, first, second, found.indices)
        ctx.mark_non_differentiable(found.indices)
        return found

    @staticmethod
    def backward(ctx: Any, d_scores: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  (nobody passes ctx by name)
        queries, first, second, indices = ctx.saved_tensors
        dtype = d_scores.dtype
        whole = [t.to(dtype).contiguous() for t in (queries, first, second)]
        found = selected_gradients(d_scores, whole[0], whole[1], whole[2], indices, ctx.needs_input_grad[:3])
        cast = (None if t is None else t.to(given.dtype) for t, given in zip(found, (queries, first, second)))
        return *cast, None, None, None
