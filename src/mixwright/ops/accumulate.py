"""LoRA experts added straight into an output, without gradients: what inference on a CPU runs.

Each adds the same sum as `ops/dispatch.py` to `out` and returns it. `add_each` multiplies the factors of one assignment
after another, where they lie; `add_grouped` multiplies each chosen expert once, and has a compiled twin in
`ops/kernels.py`. `add_lora` takes the compiled one where there is one, and else picks by `ops/cost.py`.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixwright.ops import kernels
from mixwright.ops.cost import cheaper_one_by_one


def add_lora(
    out: Float[Tensor, "tokens d_out"],
    x: Float[Tensor, "tokens d_in"],
    down: Float[Tensor, "experts rank d_in"],
    up: Float[Tensor, "experts d_out rank"],
    scale: Float[Tensor, " experts"],
    weights: Float[Tensor, "tokens k"],
    indices: Int[Tensor, "tokens k"],
) -> Float[Tensor, "tokens d_out"]:
    """out_t += sum_k w_tk s_e B_e A_e x_t by the cheapest path; the compiled one where it is loaded and fits."""
    native = kernels.kernel() if kernels.fits(out, x, down, up, scale) else None
    if native is not None:
        return kernels.add_native(
            native.add_lora, out, x, down, up, scale, weights.float().contiguous(), indices.contiguous()
        )
    (tokens, k), (experts, rank, d_in) = indices.shape, down.shape
    one_by_one = cheaper_one_by_one(tokens, k, experts=experts, rank=rank, width=d_in + up.shape[1])
    return (add_each if one_by_one else add_grouped)(out, x, down, up, scale, weights, indices)


def add_each(
    out: Float[Tensor, "tokens d_out"],
    x: Float[Tensor, "tokens d_in"],
    down: Float[Tensor, "experts rank d_in"],
    up: Float[Tensor, "experts d_out rank"],
    scale: Float[Tensor, " experts"],
    weights: Float[Tensor, "tokens k"],
    indices: Int[Tensor, "tokens k"],
) -> Float[Tensor, "tokens d_out"]:
    """One assignment after another, nothing copied: best for a few tokens."""
    strengths = (weights * scale[indices]).tolist()
    chosen = weights.tolist()
    for token, experts in enumerate(indices.tolist()):
        row, target = x[token], out[token]
        for weight, strength, expert in zip(chosen[token], strengths[token], experts):
            if weight:
                target.addmv_(up[expert], torch.mv(down[expert], row), alpha=strength)
    return out


def add_grouped(
    out: Float[Tensor, "tokens d_out"],
    x: Float[Tensor, "tokens d_in"],
    down: Float[Tensor, "experts rank d_in"],
    up: Float[Tensor, "experts d_out rank"],
    scale: Float[Tensor, " experts"],
    weights: Float[Tensor, "tokens k"],
    indices: Int[Tensor, "tokens k"],
) -> Float[Tensor, "tokens d_out"]:
    """Assignments sorted by expert, one pair of products for each expert that was chosen."""
    order, experts, counts = assignments(weights, indices, down.shape[0])
    token = order // indices.shape[-1]
    strength = (weights * scale[indices]).reshape(-1)[order].to(x.dtype)
    rows = x[token]
    hidden = x.new_empty((len(order), down.shape[1]))
    for expert, inputs, target in zip(experts, rows.split(counts), hidden.split(counts)):
        torch.mm(inputs, down[expert].T, out=target)
    hidden *= strength[:, None]
    outputs = rows if rows.shape[1] == out.shape[1] else x.new_empty((len(order), out.shape[1]))
    for expert, inputs, target in zip(experts, hidden.split(counts), outputs.split(counts)):
        torch.mm(inputs, up[expert].T, out=target)
    return out.index_add_(0, token, outputs)


def assignments(
    weights: Float[Tensor, "tokens k"], indices: Int[Tensor, "tokens k"], num_experts: int
) -> tuple[Int[Tensor, " assignments"], list[int], list[int]]:
    """The assignments of non-zero weight, sorted by expert: places in the flat `indices`, experts, and their counts."""
    flat = indices.reshape(-1)
    busy = weights.detach().reshape(-1).nonzero().squeeze(-1)
    chosen = flat[busy]
    order = busy[chosen.argsort(stable=True)]
    counts = torch.bincount(chosen, minlength=num_experts).tolist()
    experts = [expert for expert, count in enumerate(counts) if count]
    return order, experts, [counts[expert] for expert in experts]
