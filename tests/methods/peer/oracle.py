"""PEER in loops over tokens, heads and all N experts, in float64: what every path has to agree with."""

import torch
from torch import Tensor
from torch.nn import functional

from mixwright.methods.peer.layer import PEER

ACTIVATIONS = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
    "relu_squared": lambda x: functional.relu(x) ** 2,
}


def gates_of(kind: str, scores: Tensor) -> Tensor:
    """One head's weights of what it retrieved."""
    if kind == "softmax":
        return torch.exp(scores - scores.logsumexp(0))
    if kind == "relu":
        return scores.clamp_min(0)
    if kind == "one":
        return torch.ones_like(scores)
    gates = 1 / (1 + torch.exp(-scores))
    return gates if kind == "sigmoid" else gates / gates.sum()


def standardised(layer: PEER, queries: Tensor) -> Tensor:
    """`(tokens, heads, dim)` under the layer's norm."""
    norm, kind = layer.router.norm, type(layer.router.norm).__name__
    if kind == "NoQueryNorm":
        return queries
    if kind in ("BatchQueryNorm", "PastBatchQueryNorm"):
        mean, var = norm.mean, norm.var
        if layer.training and kind == "BatchQueryNorm":
            mean, var = queries.mean(0), queries.var(0, unbiased=False)
        return (queries - mean) / torch.sqrt(var + 1e-5) * norm.weight + norm.bias
    halves = queries.unflatten(-1, (2, -1))
    if norm.kind == "layer":
        halves = halves - halves.mean(-1, keepdim=True)
    if norm.kind == "l2":
        halves = halves / halves.square().sum(-1, keepdim=True).sqrt()
    else:
        halves = halves / torch.sqrt(halves.square().mean(-1, keepdim=True) + 1e-5)
    out = halves.flatten(-2) * norm.weight
    return out if norm.bias is None else out + norm.bias


def peer_in_loops(layer: PEER, x: Tensor) -> Tensor:
    """`(tokens, dim)` -> `(tokens, dim)`."""
    router, experts, table = layer.router, layer.experts, layer.experts.table
    half, (n1, n2) = router.dim_key // 2, router.grid
    queries = x @ router.queries.weight.T
    if router.queries.bias is not None:
        queries = queries + router.queries.bias
    queries = standardised(layer, queries.unflatten(-1, (router.heads, router.dim_key)))
    out = []
    for token in range(len(x)):
        inside = x[token] if experts.project_in is None else experts.project_in.weight @ x[token]
        y = torch.zeros(table.width, dtype=x.dtype)
        for head in range(router.heads):
            at = head if len(router.keys_first) > 1 else 0
            one = router.keys_first[at] @ queries[token, head, :half]
            two = router.keys_second[at] @ queries[token, head, half:]
            every = (one[:, None] + two[None, :]).flatten()
            assert len(every) == n1 * n2
            ids = every.detach().argsort(descending=True, stable=True)[: router.top_k]
            for gate, e in zip(gates_of(router.gate, every[ids]), ids, strict=True):
                rows = table.rows[e]
                act = ACTIVATIONS[experts.activation]
                if table.parts == 1:
                    hidden = torch.ones((), dtype=x.dtype)
                elif table.parts == 2:
                    before = rows[0] @ inside
                    hidden = act(before if table.bias is None else before + table.bias[e, 0])
                else:
                    value, gating = rows[0] @ inside, rows[1] @ inside
                    if table.bias is not None:
                        value, gating = value + table.bias[e, 0], gating + table.bias[e, 1]
                    hidden = act(gating) * value
                y = y + gate * hidden * rows[-1]
        if experts.project_out is not None:
            y = experts.project_out.weight @ y
        if experts.output_gate is not None:
            w1, w2 = experts.output_gate.gate, experts.output_gate.out
            y = w2.weight @ (y * functional.silu(w1.weight @ x[token] + w1.bias)) + w2.bias
        out.append(y if experts.out_bias is None else y + experts.out_bias)
    return torch.stack(out)
