"""Route tokens to LoRA experts and combine their outputs: y_t = sum_k w_tk s_e B_e A_e x_t with e = indices_tk.

`lora_reference` is the specification; the others compute the same and differ in cost. `lora_dense` multiplies the
stacked factors of all experts, `lora_gathered` copies the chosen factors for each token, `lora_grouped` sorts the
assignments by expert and multiplies each group once. Where no gradient is recorded, `ops/accumulate.py` has twins that
add straight into an output. No path but the dense one touches an expert whose weight is zero, and none ever holds the
outputs of all experts.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixwright.ops.accumulate import add_lora, assignments
from mixwright.ops.grouped_mm import grouped_mm_fits, lora_grouped_mm

FEW_TOKENS = 16


def lora_reference(
    x: Float[Tensor, "tokens d_in"],
    down: Float[Tensor, "experts rank d_in"],
    up: Float[Tensor, "experts d_out rank"],
    scale: Float[Tensor, " experts"],
    weights: Float[Tensor, "tokens k"],
    indices: Int[Tensor, "tokens k"],
) -> Float[Tensor, "tokens d_out"]:
    """Token by token, as the formula is written. A weight of exactly zero leaves its expert, and its gradient, out."""
    rows: list[Tensor] = []
    for token in range(x.shape[0]):
        row = x.new_zeros(up.shape[1])
        for weight, expert in zip(weights[token], indices[token], strict=True):
            if weight != 0:
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
    """All experts as two matrix products, with the weights between them. A weight of zero has a gradient here."""
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
    """Copies the factors that each token chose: for a few tokens, where gradients or a compiler want plain tensors."""
    idle = (weights == 0)[..., None, None]
    hidden = torch.einsum("tkri,ti->tkr", down[indices].masked_fill(idle, 0.0), x)
    hidden = hidden * (weights * scale[indices]).to(x.dtype).unsqueeze(-1)
    return torch.einsum("tkor,tkr->to", up[indices].masked_fill(idle, 0.0), hidden)


def lora_grouped(
    x: Float[Tensor, "tokens d_in"],
    down: Float[Tensor, "experts rank d_in"],
    up: Float[Tensor, "experts d_out rank"],
    scale: Float[Tensor, " experts"],
    weights: Float[Tensor, "tokens k"],
    indices: Int[Tensor, "tokens k"],
) -> Float[Tensor, "tokens d_out"]:
    """Assignments sorted by expert, one pair of products for each expert that was chosen: for many tokens."""
    out = x.new_zeros((x.shape[0], up.shape[1]))
    order, experts, counts = assignments(weights, indices, down.shape[0])
    if not experts:
        return out
    token = order // indices.shape[-1]
    strength = (weights * scale[indices]).reshape(-1)[order].to(x.dtype)
    # Slices of an unbound tensor have one backward together; down[e] would make a full-size gradient for each expert.
    downs, ups = down.unbind(), up.unbind()
    hidden = torch.cat([rows @ downs[e].T for e, rows in zip(experts, x[token].split(counts))]) * strength[:, None]
    outputs = torch.cat([rows @ ups[e].T for e, rows in zip(experts, hidden.split(counts))])
    return out.index_add(0, token, outputs.to(out.dtype))


def combine_lora(
    x: Float[Tensor, "*batch d_in"],
    down: Float[Tensor, "experts rank d_in"],
    up: Float[Tensor, "experts d_out rank"],
    scale: Float[Tensor, " experts"],
    weights: Float[Tensor, "*decision k"],
    indices: Int[Tensor, "*decision k"] | None = None,
    *,
    onto: Float[Tensor, "*batch d_out"] | None = None,
) -> Float[Tensor, "*batch d_out"]:
    """The same by whichever path is cheapest. Without `indices` the last axis of `weights` is all experts in order.

    `onto` is an output to which the result is added; it is overwritten where no gradient is recorded, so hand over only
    a tensor that nobody else holds.
    """
    learned = torch.is_grad_enabled() and weights.requires_grad
    if indices is None and not learned and not torch.compiler.is_compiling():
        down, up, scale, weights, indices = _without_idle(down, up, scale, weights)
    if indices is None:
        combined = lora_dense(x, down, up, scale, weights)
        return combined if onto is None else onto + combined
    leading, tokens, k, d_out = x.shape[:-1], x.shape[:-1].numel(), indices.shape[-1], up.shape[1]
    flat = x.reshape(tokens, x.shape[-1])
    weights = weights.expand(*leading, k).reshape(tokens, k)
    indices = indices.expand(*leading, k).reshape(tokens, k)
    if _in_place(flat, down, up, weights, onto):
        out = flat.new_zeros((tokens, d_out)) if onto is None else onto.view(tokens, d_out)
        return add_lora(out, flat, down, up, scale, weights, indices).view(*leading, d_out)
    if tokens <= FEW_TOKENS or torch.compiler.is_compiling():
        path = lora_gathered
    else:
        path = lora_grouped_mm if x.is_cuda and grouped_mm_fits(x, down, up) else lora_grouped
    combined = path(flat, down, up, scale, weights, indices).view(*leading, d_out)
    return combined if onto is None else onto + combined


def _without_idle(
    down: Tensor, up: Tensor, scale: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Dense weights without the experts that they leave out: fewer rows for one choice, indices for many choices."""
    busy = weights != 0
    most = int(busy.sum(-1).max()) if weights.numel() else 0
    if most == weights.shape[-1]:
        return down, up, scale, weights, None
    if weights.numel() == weights.shape[-1]:
        rows = busy.reshape(-1).nonzero().squeeze(-1)
        return down[rows], up[rows], scale[rows], weights[..., rows], None
    indices = weights.abs().topk(most, dim=-1).indices
    return down, up, scale, weights.gather(-1, indices), indices


def _in_place(x: Tensor, down: Tensor, up: Tensor, weights: Tensor, onto: Tensor | None) -> bool:
    """Whether results may be written rather than returned: nothing is recorded or compiled, and memory is the CPU's."""
    tensors = (x, down, up, weights, onto)
    recorded = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    writable = onto is None or (onto.dtype == x.dtype and onto.is_contiguous())
    plain = type(x) is Tensor and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return not recorded and writable and plain and not torch.compiler.is_compiling()
