"""PEER as a layer: y = x + layer(x)."""

import math
import os
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mixwright.evaluation.neuron_sites import neurons_of, plain_router
from mixwright.experts.disk_table import to_disk
from mixwright.experts.neuron import NeuronExperts, OutputGate
from mixwright.experts.quantised_table import in_fewer_bits
from mixwright.experts.table import AbstractTable, NeuronTable, initial_rows, out_std_for
from mixwright.methods.peer import layouts
from mixwright.methods.peer.presets import PRESETS
from mixwright.methods.peer.verbs import NeuronVerbs
from mixwright.ops.neuron import Activation
from mixwright.routers.product_key import GateName, ProductKeyRouter
from mixwright.routers.query_norm import KeyNormName, QueryNormName, known
from mixwright.routing import Condition

OUTPUT_RMS = 0.5
QUERY_BYTES = 1 << 20


class InputNorm(nn.Module):
    """sqrt(d) x / |x| (gamma + 1), the `pre_rmsnorm` of PEER-pytorch."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """The normalised input."""
        scale = (self.gamma + 1).to(x.dtype) * x.shape[-1] ** 0.5
        return nn.functional.normalize(x, dim=-1) * scale


class PEER(NeuronVerbs):
    """f(x) = sum over heads and retrieved experts of g e(x), e(x) = act(<u, x>) v (He 2024, section 2, Algorithm 1).

    `num_experts`: a square number N, or a grid (n1, n2) of sub-keys. `top_k`: experts per head. `dim_key`: the width of
    a head's query, both halves. `gate`: softmax, sigmoid, relu, renormalised, one. `query_norm`: batch, past_batch,
    layer, rms, l2, none; under `batch`, in training, outputs depend on later tokens. `gated`: experts of three rows,
    act(<g, x>) <u, x> v. `values_only`: experts of one row, v: product-key memory. `row_dim`: narrow rows between two
    projections. `table`: another layer's rows, for both. `output_gate`: memory+'s. `dropout`: of the neurons' values.
    `input_norm`, `half_top_k`, `separate_heads`: as PEER-pytorch has them.

    First values: <u, x> has the size of x's entries, and rows out are such that outputs have a root mean square of
    about 0.5 for inputs of 1; `calibrate` measures it. Set experts.table.rows[:, -1] to 0 beside a layer that exists.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int | tuple[int, int] = 1024 * 1024,
        *,
        heads: int = 8,
        top_k: int = 16,
        dim_key: int = 256,
        gate: GateName = "softmax",
        query_norm: QueryNormName = "batch",
        key_norm: KeyNormName = "none",
        share_keys: bool = True,
        query_bias: bool = False,
        activation: Activation = "gelu",
        gated: bool = False,
        values_only: bool = False,
        row_dim: int | None = None,
        table: AbstractTable | None = None,
        output_gate: bool = False,
        dropout: float = 0.0,
        input_norm: bool = False,
        half_top_k: int | None = None,
        separate_heads: bool = False,
    ) -> None:
        super().__init__()
        for name, value, names in (
            ("gate", gate, GateName),
            ("query_norm", query_norm, QueryNormName),
            ("key_norm", key_norm, KeyNormName),
            ("activation", activation, Activation),
        ):
            known(name, value, get_args(names))
        if dim < 1 or (row_dim is not None and row_dim < 1):
            raise ValueError(f"dim={dim}, row_dim={row_dim}; widths are at least 1.")
        if gated and values_only:
            raise ValueError("gated and values_only exclude each other: experts have three rows, or one.")
        self.dim = dim
        self.router = ProductKeyRouter(
            dim,
            _grid(num_experts),
            heads,
            top_k,
            dim_key,
            gate,
            query_norm,
            key_norm,
            share_keys,
            query_bias,
            half_top_k=half_top_k,
            separate_heads=separate_heads,
        )
        count, parts, width = self.router.num_experts, 1 if values_only else 3 if gated else 2, row_dim or dim
        if table is None:
            std = out_std_for(OUTPUT_RMS, heads, top_k, gate, None if values_only else activation, count)
            table = NeuronTable(initial_rows(count, parts, width, std))
        elif (table.num_experts, table.parts, table.width) != (count, parts, width):
            raise ValueError(
                f"table has {table.num_experts} experts of {table.parts} rows of {table.width} numbers; this layer "
                f"needs {count} of {parts} of {width}."
            )
        narrow = row_dim is not None
        self.input_norm = InputNorm(dim) if input_norm else None
        self.experts = NeuronExperts(
            table,
            activation,
            _projection(dim, width) if narrow else None,
            _projection(width, dim) if narrow and not output_gate else None,
            output_gate=OutputGate(dim, width, dim) if output_gate else None,
            dropout=dropout,
        )

    @classmethod
    def preset(cls, name: str, dim: int, num_experts: int | tuple[int, int] | None = None, **changes: Any) -> "PEER":
        """`paper`, `peer_pytorch` or `memory_plus`, with `changes`: see `presets.py` for what each of them says."""
        known("preset", name, tuple(PRESETS))
        options = {**PRESETS[name].options, **changes}
        options["dim_key"] = options["dim_key"] or 2 * (dim // 2)
        if num_experts is not None:
            options["num_experts"] = num_experts
        layer, draw = cls(dim, **options), PRESETS[name].draw
        if draw is not None:
            draw(layer.router, layer.experts)
        return layer

    def forward(
        self, x: Float[Tensor, "*batch dim"], token_mask: Bool[Tensor, "*batch"] | None = None
    ) -> Float[Tensor, "*batch dim"]:
        """The retrieved experts' sum; tokens that are masked out get zero, and have no part in anything.

        In eval mode without gradients tokens come in pieces, so that memory beyond the output stays under 5 MB.
        """
        if x.shape[-1:] != (self.dim,):
            raise ValueError(f"x has shape {tuple(x.shape)}; its last axis must be dim={self.dim}.")
        if not x.is_floating_point():
            raise TypeError(f"x has dtype {x.dtype}; expected floating point numbers, as hidden states are.")
        if token_mask is not None and token_mask.shape != x.shape[:-1]:
            raise ValueError(
                f"token_mask has shape {tuple(token_mask.shape)}; expected {tuple(x.shape[:-1])}, true for real tokens."
            )
        tokens = x.reshape(-1, self.dim)
        mask = None if token_mask is None else token_mask.reshape(-1).bool()
        piece = self._piece(tokens)
        if len(tokens) <= piece:
            return self._pass(tokens, mask).reshape(x.shape)
        out = torch.empty_like(tokens)
        for start in range(0, len(tokens), piece):
            part = slice(start, start + piece)
            out[part] = self._pass(tokens[part], None if mask is None else mask[part])
        return out.view(x.shape)

    def _pass(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            tokens = tokens.masked_fill(~mask[:, None], 0)
        inside = (tokens if self.input_norm is None else self.input_norm(tokens))[None]
        condition = Condition(token_mask=None if mask is None else mask[None])
        out = self.experts(inside, self.router(inside, condition), condition)[0]
        return out if mask is None else out.masked_fill(~mask[:, None], 0)

    def _piece(self, tokens: Tensor) -> int:
        """How many tokens at once: all, unless outputs are all that is asked for."""
        whole = self.training or torch.is_grad_enabled() or neurons_of(self.experts).table.collective
        watched = self.router.observers or self.router._forward_hooks or self.router._forward_pre_hooks
        if whole or watched or torch.compiler.is_compiling():
            return max(1, len(tokens))
        router = plain_router(self.router)
        return max(16, QUERY_BYTES // (4 * router.heads * router.dim_key))

    @torch.no_grad()
    def calibrate(self, x: Float[Tensor, "*batch dim"], rms: float = OUTPUT_RMS) -> float:
        """Scale rows out so that outputs for `x` have this root mean square; returns the factor."""
        table = self.experts.table
        if not isinstance(table, NeuronTable):
            raise ValueError(f"calibrate writes rows, and a {type(table).__name__} is read only; calibrate before.")
        measured = float(self(x).float().square().mean().sqrt())
        if not measured > 0:
            raise ValueError("calibrate: outputs are zero or not finite, so no factor changes their size.")
        table.rows[:, -1] *= rms / measured
        return rms / measured

    @classmethod
    def from_peer_pytorch(cls, source: nn.Module | Mapping[str, Tensor], **settings: Any) -> "PEER":
        """A layer with the weights, settings and outputs of PEER-pytorch's `PEER`, or of its state dict.

        A state dict does not say `top_k`, `gate`, `activation`, `dropout` and `half_top_k`: give them, or they are that
        implementation's defaults. Raises ValueError for an activation that is not ours.
        """
        if isinstance(source, nn.Module):
            settings = {**layouts.settings_of_peer_pytorch(source), **settings}
            source = source.state_dict()
        return cls._from(layouts.from_peer_pytorch(source), {"top_k": 1, "gate": "relu", **settings})

    @classmethod
    def from_xlm(cls, state: Mapping[str, Tensor], top_k: int = 32, **settings: Any) -> "PEER":
        """A layer with the weights and outputs of a product-key memory of XLM."""
        return cls._from(layouts.from_xlm(state), {"top_k": top_k, **settings})

    @classmethod
    def from_meta(cls, state: Mapping[str, Tensor], top_k: int = 32, **settings: Any) -> "PEER":
        """A layer with the weights and outputs of a memory layer of Berges et al. 2024, values or PEER variant."""
        return cls._from(layouts.from_meta(state), {"top_k": top_k, **settings})

    @classmethod
    def _from(cls, state: dict[str, Tensor], settings: dict[str, Any]) -> "PEER":
        options = {**layouts.options_of(state), **settings}
        with torch.device("meta"):
            layer = cls(**options)
        layer.to_empty(device=state["router.queries.weight"].device)
        fresh = {name: t for name, t in layer.state_dict().items() if name not in state}
        for tensor in fresh.values():
            tensor.zero_()
        if layer.experts.table.rows.dtype != state["experts.table.rows"].dtype:  # type: ignore[union-attr]
            layer.to(state["experts.table.rows"].dtype)
        layer.load_state_dict({**fresh, **{name: t.clone() for name, t in state.items()}})
        return layer

    def quantize(self, dtype: Literal["int8", "bfloat16"] = "int8") -> "PEER":
        """Keep the rows in fewer bits from now on; returns this layer. int8, a float32 scale for each row part, errs by
        about 1 % of the output and does not learn; bfloat16 by about 0.25 %, and learns.
        """
        self.experts.table = in_fewer_bits(self.experts.table, dtype)
        return self

    def to_disk(self, path: str | os.PathLike[str], cache_bytes: int = 1 << 26) -> "PEER":
        """Write the rows to a file and read them from there from now on, through a cache of `cache_bytes`; returns this
        layer. They do not learn. A layer on rows that are there already: `PEER(..., table=DiskTable(path))`.
        """
        self.experts.table = to_disk(self.experts.table, path, cache_bytes)
        return self

    def to_peer_pytorch(self) -> dict[str, Tensor]:
        """The state dict of a `PEER` of PEER-pytorch. Raises ValueError for what that layer cannot be."""
        return layouts.to_peer_pytorch(self.state_dict())

    def to_xlm(self) -> dict[str, Tensor]:
        """The state dict of XLM's memory. Raises ValueError for what it cannot be."""
        return layouts.to_xlm(self.state_dict())

    def to_meta(self) -> dict[str, Tensor]:
        """The state dict of Meta's memory layer. Raises ValueError for what it cannot be."""
        return layouts.to_meta(self.state_dict())

    def extra_repr(self) -> str:
        """The sizes."""
        router = plain_router(self.router)
        return f"dim={self.dim}, grid={router.grid}, heads={router.heads}, top_k={router.top_k}, gate={router.gate!r}"


def _projection(d_in: int, d_out: int) -> nn.Linear:
    """One that keeps the size of entries."""
    layer = nn.Linear(d_in, d_out, bias=False)
    nn.init.normal_(layer.weight, std=d_in**-0.5)
    return layer


def _grid(num_experts: int | tuple[int, int]) -> tuple[int, int]:
    if not isinstance(num_experts, int):
        if len(num_experts) != 2:  # pyright: ignore[reportUnnecessaryComparison]  (a border: a config holds anything)
            raise ValueError(
                f"num_experts={num_experts}: expected a square number, or two numbers of sub-keys (n1, n2)."
            )
        return num_experts
    side = math.isqrt(max(0, num_experts))
    if num_experts < 1 or side**2 != num_experts:
        near = f"{max(1, side) ** 2} or {(side + 1) ** 2}"
        raise ValueError(f"num_experts={num_experts} is no square; give a grid (n1, n2), or {near}.")
    return side, side
