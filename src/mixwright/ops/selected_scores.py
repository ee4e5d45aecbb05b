"""Scores of retrieved experts as a function of queries and sub-keys, looking at the retrieved sub-keys only."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixwright.ops import kernels
from mixwright.ops.product_key import plain_floats


def selected_scores(
    queries: Float[Tensor, "tokens heads 2 half"],
    first: Float[Tensor, "key_heads n1 half"],
    second: Float[Tensor, "key_heads n2 half"],
    indices: Int[Tensor, "tokens heads k"],
) -> Float[Tensor, "tokens heads k"]:
    """<q, c_i> + <q', c'_j> of each id i * n2 + j. `key_heads` is 1 where heads share their sub-keys."""
    native = kernels.kernel() if fits(queries, first, second) else None
    if native is None:
        return selected_scores_reference(queries, first, second, indices)
    queries, indices = queries.contiguous(), indices.contiguous()
    if torch.is_grad_enabled() and any(t.requires_grad for t in (queries, first, second)):
        return _Selected.apply(native, queries, first, second, indices)  # type: ignore[no-any-return]
    return _forward(native, queries, first, second, indices)


def selected_scores_reference(
    queries: Float[Tensor, "tokens heads 2 half"],
    first: Float[Tensor, "key_heads n1 half"],
    second: Float[Tensor, "key_heads n2 half"],
    indices: Int[Tensor, "tokens heads k"],
) -> Float[Tensor, "tokens heads k"]:
    """The same as it is written."""
    n2 = second.shape[1]
    rows, columns = indices // n2, indices % n2
    head = torch.arange(queries.shape[1], device=queries.device)[None, :, None] if first.shape[0] > 1 else 0
    return torch.einsum("thd,thkd->thk", queries[:, :, 0], first[head, rows]) + torch.einsum(
        "thd,thkd->thk", queries[:, :, 1], second[head, columns]
    )


def selected_gradients(
    d_scores: Float[Tensor, "tokens heads k"],
    queries: Float[Tensor, "tokens heads 2 half"],
    first: Float[Tensor, "key_heads n1 half"],
    second: Float[Tensor, "key_heads n2 half"],
    indices: Int[Tensor, "tokens heads k"],
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of the queries and of both axes' sub-keys, where wanted; with a gradient of their own where one is kept."""
    native = kernels.kernel() if fits(queries, first, second) and not torch.is_grad_enabled() else None
    if native is None:
        return _by_torch(d_scores, queries, first, second, indices, wanted)
    d_scores, sizes = d_scores.contiguous(), _sizes(queries, first, second, indices)
    d_queries = torch.empty_like(queries) if wanted[0] else None
    d_first, d_second = (torch.zeros_like(t) if want else None for t, want in zip((first, second), wanted[1:]))
    places = [0 if t is None else t.data_ptr() for t in (d_queries, d_first, d_second)]
    given = (d_scores, indices, queries, first, second)
    native.selected_backward(*places, *(t.data_ptr() for t in given), *sizes)
    return d_queries, d_first, d_second


def fits(queries: Tensor, first: Tensor, second: Tensor) -> bool:
    """Whether the compiled twin takes these tensors."""
    keys = first.is_contiguous() and second.is_contiguous()
    return keys and queries.numel() > 0 and plain_floats(queries, first, second)


def _sizes(queries: Tensor, first: Tensor, second: Tensor, indices: Tensor) -> tuple[int, ...]:
    return (*indices.shape, first.shape[0], first.shape[1], second.shape[1], queries.shape[-1])


def _forward(native: kernels.Kernels, queries: Tensor, first: Tensor, second: Tensor, indices: Tensor) -> Tensor:
    scores = queries.new_empty(indices.shape)
    pointers = (t.data_ptr() for t in (scores, indices, queries, first, second))
    native.selected(*pointers, *_sizes(queries, first, second, indices))
    return scores


def _by_torch(
    d_scores: Tensor, queries: Tensor, first: Tensor, second: Tensor, indices: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        given = [t if again else t.detach() for t in (queries, first, second)]
        given = [t.requires_grad_() if want and not t.requires_grad else t for t, want in zip(given, wanted)]
        scores = selected_scores_reference(given[0], given[1], given[2], indices)
        asked = [t for t, want in zip(given, wanted) if want]
        found = iter(torch.autograd.grad(scores, asked, d_scores, create_graph=again))
    d_queries, d_first, d_second = (next(found) if want else None for want in wanted)
    return d_queries, d_first, d_second


class _Selected(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, native: kernels.Kernels, queries: Tensor, first: Tensor, second: Tensor, indices: Tensor
    ) -> Tensor:
        ctx.save_for_backward(queries, first, second, indices)
        return _forward(native, queries, first, second, indices)

    @staticmethod
    def backward(ctx: Any, d_scores: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  (nobody passes ctx by name)
        queries, first, second, indices = ctx.saved_tensors
        wanted: tuple[bool, bool, bool] = ctx.needs_input_grad[1:4]
        return None, *selected_gradients(d_scores, queries, first, second, indices, wanted), None
