"""A beam search reorders its rows at every step, and a trace of it must follow each answer's own path."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from mixwright.routing import Routing


def align_trace(
    trace: Mapping[str, Sequence[Routing]], beam_indices: Int[Tensor, "answers steps"]
) -> dict[str, list[Routing]]:
    """The trace of a `generate` call with one row for each returned answer, in the answers' order.

    `beam_indices` is what `generate(..., return_dict_in_generate=True, output_scores=True)` returns: the row from
    which each answer took its token at each step, -1 after its end. The routing of a token that an answer does not
    have gets weight zero. A pass with fewer rows than the search has (an encoder's) is repeated for its beams.
    """
    rows = 1 + int(beam_indices.max())
    longest = {site: max((_rows(routing) for routing in passes), default=0) for site, passes in trace.items()}
    rows = max([rows, *longest.values()])
    return {site: _aligned(passes, beam_indices, rows) for site, passes in trace.items()}


def _aligned(passes: Sequence[Routing], beam_indices: Tensor, rows: int) -> list[Routing]:
    aligned: list[Routing] = []
    for step, routing in enumerate(passes[: beam_indices.shape[1]]):
        parents = _ancestors(beam_indices, step)
        own = _rows(routing)
        if own <= 1:
            aligned.append(routing)
            continue
        chosen = parents.clamp_min(0) // max(1, rows // own)
        weights = routing.weights[chosen]
        over = (parents < 0).reshape(-1, *[1] * (weights.dim() - 1))
        indices = None if routing.indices is None else routing.indices[chosen.to(routing.indices.device)]
        aligned.append(Routing(weights.masked_fill(over, 0.0), routing.num_experts, indices))
    return aligned


def _ancestors(beam_indices: Tensor, step: int) -> Tensor:
    return beam_indices[:, step].to(torch.long)


def _rows(routing: Routing) -> int:
    return routing.weights.shape[0] if routing.weights.dim() > 2 else 1
