"""The grouped path as two calls of torch's grouped matrix product: no loop, and no waiting for a GPU's answer.

Checked on the CPU, where torch computes the same operator group by group; never yet timed on a GPU.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


def grouped_mm_fits(x: Tensor, down: Tensor, up: Tensor) -> bool:
    """Whether torch has the operator and takes these tensors: half precision, rows of whole 16-byte words."""
    word = 16 // x.element_size()
    whole = all(size % word == 0 for size in (*down.shape[1:], *up.shape[1:]))
    return hasattr(functional, "grouped_mm") and x.dtype == torch.bfloat16 == down.dtype == up.dtype and whole


def lora_grouped_mm(
    x: Float[Tensor, "tokens d_in"],
    down: Float[Tensor, "experts rank d_in"],
    up: Float[Tensor, "experts d_out rank"],
    scale: Float[Tensor, " experts"],
    weights: Float[Tensor, "tokens k"],
    indices: Int[Tensor, "tokens k"],
) -> Float[Tensor, "tokens d_out"]:
    """Assignments sorted by expert; those of weight zero go last, past every group, and their rows are dropped."""
    experts, busy = down.shape[0], weights.detach().reshape(-1) != 0
    key = torch.where(busy, indices.reshape(-1), experts)
    order = key.argsort(stable=True)
    token, busy = order // indices.shape[-1], busy[order][:, None]
    ends = torch.searchsorted(key[order], torch.arange(experts, device=x.device), right=True).to(torch.int32)
    strength = (weights * scale[indices]).reshape(-1)[order].to(x.dtype)
    # Rows past the last group are left unwritten, in the backward pass too: mask them on every side.
    rows = torch.where(busy, x[token], 0.0)
    hidden = functional.grouped_mm(rows, down.mT, offs=ends)
    hidden = torch.where(busy, hidden * strength[:, None], 0.0)
    outputs = torch.where(busy, functional.grouped_mm(hidden, up.mT, offs=ends), 0.0)
    return x.new_zeros((x.shape[0], up.shape[1])).index_add(0, token, outputs)
