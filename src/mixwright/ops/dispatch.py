"""Route tokens to LoRA experts and combine their outputs: y_t = sum_k w_tk s_e B_e A_e x_t with e = indices_tk.

`lora_reference` is the specification. The others compute the same and differ in cost: `lora_dense` multiplies the
stacked factors of all experts, `lora_gathered` copies the chosen factors for each token, `lora_grouped` sorts the
assignments by expert and multiplies each group once.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def lora_reference(
    x: Float[Tensor, "tokens d_in"],
    down: Float[Tensor, "experts rank d_in"],
    up: Float[Tensor, "experts d_out rank"],
    scale: Float[Tensor, " experts"],
    weights: Float[Tensor, "tokens k"],
    indices: Int[Tensor, "tokens k"],
) -> Float[Tensor, "tokens d_out"]:
    """Token by token, as the formula is written."""
    rows: list[Tensor] = []
    for token in range(x.shape[0]):
        row = x.new_zeros(up.shape[1])
        for weight, expert in zip(weights[token], indices[token], strict=True):
            row = row + weight.to(x.dtype) * scale[expert].to(x.dtype) * (up[expert] @ (down[expert] @ x[token]))
        rows.append(row)
    return torch.stack(rows) if rows else x.new_zeros((0, up.shape[1]))


def lora_dense(
    x: Float[Tensor, "*batch d_in"],
    down: Float[Tensor, "experts rank d_in"],
    up: Float[Tensor, "experts d_out rank"],
    scale: Float[Tensor, " experts"],
    weights: Float[Tensor, "*decision experts"],
) -> Float[Tensor, "*batch d_out"]:
    """All experts as two matrix products, with the weights between them."""
    hidden = torch.einsum("...i,eri->...er", x, down)
    hidden = hidden * (weights * scale).to(x.dtype).unsqueeze(-1)
    return torch.einsum("...er,eor->...o", hidden, up)


def lora_gathered(
    x: Float[Tensor, "tokens d_in"],
    down: Float[Tensor, "experts rank d_in"],
    up: Float[Tensor, "experts d_out rank"],
    scale: Float[Tensor, " experts"],
    weights: Float[Tensor, "tokens k"],
    indices: Int[Tensor, "tokens k"],
) -> Float[Tensor, "tokens d_out"]:
    """Copies the factors that each token chose: best for a few tokens."""
    hidden = torch.einsum("tkri,ti->tkr", down[indices], x)
    hidden = hidden * (weights * scale[indices]).to(x.dtype).unsqueeze(-1)
    return torch.einsum("tkor,tkr->to", up[indices], hidden)


def lora_grouped(
    x: Float[Tensor, "tokens d_in"],
    down: Float[Tensor, "experts rank d_in"],
    up: Float[Tensor, "experts d_out rank"],
    scale: Float[Tensor, " experts"],
    weights: Float[Tensor, "tokens k"],
    indices: Int[Tensor, "tokens k"],
) -> Float[Tensor, "tokens d_out"]:
    """Assignments sorted by expert, one pair of products for each expert that was chosen: best for many tokens."""
    order = indices.reshape(-1).argsort(stable=True)
    token = order // indices.shape[-1]
    strength = (weights * scale[indices]).reshape(-1)[order].to(x.dtype)
    counts = torch.bincount(indices.reshape(-1), minlength=down.shape[0]).tolist()
    out = x.new_zeros((x.shape[0], up.shape[1]))
    start = 0
    for expert, count in enumerate(counts):
        if count:
            rows = token[start : start + count]
            hidden = (x[rows] @ down[expert].T) * strength[start : start + count, None]
            out = out.index_add(0, rows, hidden @ up[expert].T)
            start += count
    return out


def combine_lora(
    x: Float[Tensor, "*batch d_in"],
    down: Float[Tensor, "experts rank d_in"],
    up: Float[Tensor, "experts d_out rank"],
    scale: Float[Tensor, " experts"],
    weights: Float[Tensor, "*decision k"],
    indices: Int[Tensor, "*decision k"] | None = None,
) -> Float[Tensor, "*batch d_out"]:
    """The same by whichever path is cheapest. Without `indices` the last axis of `weights` is all experts in order."""
    if indices is None:
        return lora_dense(x, down, up, scale, weights)
    leading = x.shape[:-1]
    flat = x.reshape(-1, x.shape[-1])
    shape = (*leading, indices.shape[-1])
    weights = weights.expand(shape).reshape(flat.shape[0], -1)
    indices = indices.expand(shape).reshape(flat.shape[0], -1)
    path = lora_gathered if flat.shape[0] <= 16 else lora_grouped
    return path(flat, down, up, scale, weights, indices).reshape(*leading, up.shape[1])
