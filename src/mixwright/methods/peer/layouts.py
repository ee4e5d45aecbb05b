"""State dicts of other implementations as ours, and back, bit for bit.

Expert (i, j) is i * n + j in all of them. PEER-pytorch packs queries as (half, head, dim), its sub-keys lie (head, n,
half, dim); XLM and Meta pack queries as we do, (head, half, dim), and sub-keys lie (head, half, n, dim), Meta's flat.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

State = Mapping[str, Tensor]

_NORM = {"weight": "weight", "bias": "bias", "running_mean": "mean", "running_var": "var"}
_PARTS = {"value_proj": "out", "swilu_projection": "gate"}


def options_of(state: State) -> dict[str, Any]:
    """The arguments of `PEER` that a state of ours shows; what is not in tensors is not in it."""
    first, second = state["router.keys_first"], state["router.keys_second"]
    rows, queries = state["experts.table.rows"], state["router.queries.weight"]
    heads, n1, n2 = queries.shape[0] // (2 * first.shape[2]), first.shape[1], second.shape[1]
    return {
        "dim": queries.shape[1],
        "num_experts": (n1, n2),
        "heads": heads,
        "dim_key": 2 * first.shape[2],
        "query_norm": "batch" if "router.norm.mean" in state else "none",
        "share_keys": first.shape[0] == 1 and heads > 1,
        "query_bias": "router.queries.bias" in state,
        "gated": rows.shape[1] == 3,
        "values_only": rows.shape[1] == 1,
        "row_dim": None if rows.shape[2] == queries.shape[1] else rows.shape[2],
        "output_gate": "experts.output_gate.gate.weight" in state,
        "input_norm": "input_norm.gamma" in state,
        "separate_heads": len(rows) == heads * n1 * n2 and heads > 1,
    }


def settings_of_peer_pytorch(module: nn.Module) -> dict[str, Any]:
    """What a `PEER` of PEER-pytorch is beside its weights. Raises TypeError for another module."""
    parts = ("activation", "num_experts_per_head_topk", "product_key_topk", "score_activation", "dropout")
    if not all(hasattr(module, part) for part in parts):
        raise TypeError(
            f"{type(module).__name__} is no PEER of PEER-pytorch, which has {', '.join(parts)}; give that module, or "
            "its state dict."
        )
    layer: Any = module
    activation = layer.activation
    named = {nn.ReLU: "relu", nn.SiLU: "silu"}
    if isinstance(activation, nn.GELU):
        name = "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    elif type(activation) in named:
        name = named[type(activation)]
    else:
        raise ValueError(f"activation {type(activation).__name__} is not ours; accepted are nn.GELU, nn.ReLU, nn.SiLU.")
    return {
        "top_k": layer.num_experts_per_head_topk,
        "gate": "softmax" if isinstance(layer.score_activation, nn.Softmax) else "relu",
        "activation": name,
        "dropout": float(layer.dropout.p),
        "half_top_k": layer.product_key_topk,
    }


def from_peer_pytorch(state: State) -> dict[str, Tensor]:
    """The weights of PEER-pytorch's `PEER` as ours."""
    keys, queries = _take(state, "keys"), _take(state, "to_queries.0.weight")
    heads, _, _, half = keys.shape
    ours = {
        "router.queries.weight": queries.view(2, heads, half, -1).transpose(0, 1).reshape(queries.shape),
        "router.keys_first": keys[:, :, 0],
        "router.keys_second": keys[:, :, 1],
        "experts.table.rows": torch.stack([_take(state, f"weight_{way}_embed.weight") for way in ("down", "up")], 1),
    }
    return ours | ({"input_norm.gamma": state["norm.gamma"]} if "norm.gamma" in state else {})


def to_peer_pytorch(state: State) -> dict[str, Tensor]:
    """Ours as the weights of PEER-pytorch's `PEER`."""
    _refuse_beyond(state, "PEER-pytorch", parts=(2,), norm=False)
    first, second = _square(state, "PEER-pytorch")
    heads, queries = options_of(state)["heads"], state["router.queries.weight"]
    if len(first) != heads:
        raise ValueError("PEER-pytorch has sub-keys for each head, and these are shared.")
    rows = state["experts.table.rows"]
    theirs = {
        "to_queries.0.weight": queries.view(heads, 2, first.shape[2], -1).transpose(0, 1).reshape(queries.shape),
        "keys": torch.stack([first, second], 2),
        "weight_down_embed.weight": rows[:, 0].contiguous(),
        "weight_up_embed.weight": rows[:, 1].contiguous(),
    }
    return theirs | ({"norm.gamma": state["input_norm.gamma"]} if "input_norm.gamma" in state else {})


def from_xlm(state: State) -> dict[str, Tensor]:
    """The weights of XLM's memory, `HashingMemoryProduct`, as ours; sub-keys `(n, dim)` serve both halves."""
    keys = _take(state, "keys")
    both = keys[None, None].expand(1, 2, -1, -1) if keys.dim() == 2 else keys
    values = _take(state, "values.weight")
    return _queries_from(state, both.shape[3]) | _keys_from(both) | {"experts.table.rows": values[:, None]}


def to_xlm(state: State) -> dict[str, Tensor]:
    """Ours as the weights of XLM's memory."""
    _refuse_beyond(state, "XLM's memory", parts=(1,), norm=True)
    first, second = _square(state, "XLM's memory")
    keys = torch.stack([first, second], 1)
    if len(first) == 1 and options_of(state)["heads"] > 1:
        if not torch.equal(first, second):
            raise ValueError("XLM's memory shares sub-keys over heads only where both halves have the same.")
        keys = first[0]
    return {"keys": keys, "values.weight": state["experts.table.rows"][:, 0].contiguous()} | _queries_to(state)


def from_meta(state: State) -> dict[str, Tensor]:
    """The weights of Meta's memory layer as ours; its PEER variant has projections that it never uses, left out."""
    if any(name.startswith("gating.") for name in state):
        raise ValueError("gating.weight: a scalar gate on the memory's output (mem_gated) is not ours to represent.")
    keys, queries = _take(state, "keys"), _take(state, "query_proj.query_mlps.0.weight")
    half = keys.shape[1]
    ours = _queries_from(state, half) | _keys_from(keys.view(queries.shape[0] // (2 * half), 2, -1, half))
    if "values_u.weight" in state:
        rows = torch.stack([state["values_u.weight"], _take(state, "values_v.weight")], 1)
        return ours | {"experts.table.rows": rows}
    ours["experts.table.rows"] = _take(state, "values.weight")[:, None]
    if "value_proj.weight" in state and "swilu_projection.weight" not in state:
        raise ValueError(
            "value_proj.weight without swilu_projection.weight: a projection with a bias alone is not ours."
        )
    for theirs, name in _PARTS.items():
        for kind in ("weight", "bias"):
            if f"{theirs}.{kind}" in state:
                ours[f"experts.output_gate.{name}.{kind}"] = state[f"{theirs}.{kind}"]
    return ours


def to_meta(state: State) -> dict[str, Tensor]:
    """Ours as the weights of Meta's memory layer."""
    _refuse_beyond(state, "Meta's memory", parts=(1, 2), norm=True)
    first, second = _square(state, "Meta's memory")
    if len(first) != options_of(state)["heads"]:
        raise ValueError("Meta's memory has sub-keys for each head, and these are shared.")
    rows = state["experts.table.rows"]
    theirs = {"keys": torch.stack([first, second], 1).flatten(0, 2), **_queries_to(state)}
    if rows.shape[1] == 2:
        return theirs | {f"values_{way}.weight": rows[:, part].contiguous() for part, way in enumerate("uv")}
    theirs["values.weight"] = rows[:, 0].contiguous()
    for name, ours in _PARTS.items():
        for kind in ("weight", "bias"):
            if f"experts.output_gate.{ours}.{kind}" in state:
                theirs[f"{name}.{kind}"] = state[f"experts.output_gate.{ours}.{kind}"]
    return theirs


def _keys_from(keys: Tensor) -> dict[str, Tensor]:
    return {"router.keys_first": keys[:, 0], "router.keys_second": keys[:, 1]}


def _queries_from(state: State, half: int) -> dict[str, Tensor]:
    """A linear query network, with batch norm where there is one; XLM's notebook calls it by a shorter name."""
    at = "query_proj" if "query_proj.0.weight" in state else "query_proj.query_mlps"
    if f"{at}.2.weight" in state or f"{at}.0.0.weight" in state:
        raise ValueError(f"{at}: a query network of several layers is not ours; retrain with a linear one.")
    ours = {"router.queries.weight": _take(state, f"{at}.0.weight")}
    if f"{at}.0.bias" in state:
        ours["router.queries.bias"] = state[f"{at}.0.bias"]
    if f"{at}.1.running_mean" in state:
        for theirs, name in _NORM.items():
            ours[f"router.norm.{name}"] = _take(state, f"{at}.1.{theirs}").view(-1, 2 * half)
        ours["router.norm.steps"] = _take(state, f"{at}.1.num_batches_tracked")
    return ours


def _queries_to(state: State) -> dict[str, Tensor]:
    at = "query_proj.query_mlps"
    theirs = {f"{at}.0.weight": state["router.queries.weight"]}
    if "router.queries.bias" in state:
        theirs[f"{at}.0.bias"] = state["router.queries.bias"]
    if "router.norm.mean" in state:
        theirs |= {f"{at}.1.{name}": state[f"router.norm.{ours}"].flatten() for name, ours in _NORM.items()}
        theirs[f"{at}.1.num_batches_tracked"] = state["router.norm.steps"]
    return theirs


def _square(state: State, whose: str) -> tuple[Tensor, Tensor]:
    first, second = state["router.keys_first"], state["router.keys_second"]
    if first.shape != second.shape:
        raise ValueError(f"{whose} has square grids, and this one is {first.shape[1]} x {second.shape[1]}.")
    return first, second


def _refuse_beyond(state: State, whose: str, *, parts: tuple[int, ...], norm: bool) -> None:
    """Raises ValueError where a layer of ours does what the other one can't."""
    rows = state["experts.table.rows"]
    if rows.shape[1] not in parts:
        raise ValueError(f"{whose} has experts of {' or '.join(map(str, parts))} rows, and these have {rows.shape[1]}.")
    carried = {"router.queries.weight", "router.keys_first", "router.keys_second", "experts.table.rows"}
    if whose == "PEER-pytorch":
        carried |= {"input_norm.gamma"}
    else:
        carried |= {"router.queries.bias"}
    prefixes = ("router.norm.",) if norm else ()
    if whose == "Meta's memory":
        prefixes += ("experts.output_gate.",)
    for name, tensor in state.items():
        if name in ("router.bias_first", "router.bias_second") and not tensor.any():
            continue
        if name not in carried and not name.startswith(prefixes or ("\0",)):
            raise ValueError(f"{name}: {whose} has nothing like it.")
    if norm and "router.norm.weight" in state and "router.norm.mean" not in state:
        raise ValueError(f"router.norm.weight: {whose} knows batch norm, and no other.")


def _take(state: State, name: str) -> Tensor:
    if name not in state:
        held = ", ".join(list(state)[:6])
        raise ValueError(f"{name} is missing from the state dict, which holds {held}, ...; is it of that layer alone?")
    return state[name]
