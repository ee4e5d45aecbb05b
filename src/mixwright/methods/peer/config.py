"""PEER's card and its configuration."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from mixwright.methods.base import Method, Paper

_PAPER: Mapping[str, Any] = {
    "num_experts": (1024, 1024),
    "heads": 8,
    "top_k": 16,
    "dim_key": 256,
    "gate": "softmax",
    "query_norm": "batch",
    "key_norm": "none",
    "share_keys": True,
    "query_bias": False,
    "activation": "gelu",
    "values_only": False,
    "output_gate": False,
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": _PAPER,
    "peer_pytorch": {**_PAPER, "num_experts": (1000, 1000), "top_k": 1, "dim_key": None, "gate": "relu"}
    | {"query_norm": "none", "share_keys": False},
    "memory_plus": {**_PAPER, "heads": 4, "top_k": 32, "dim_key": 512, "query_norm": "none", "share_keys": False}
    | {"query_bias": True, "values_only": True, "output_gate": True},
}
"""Options of `PEER`; `dim_key` None: the width of the model. `paper`: He 2024; the width of queries, which it does not
say, is Lample et al.'s. `peer_pytorch`: the defaults of PEER-pytorch 0.2, under which each head uses one expert, not
16. `memory_plus`: Berges et al. 2024 and their code."""


@dataclass(frozen=True, kw_only=True)
class PeerConfig:
    """He 2024 (arXiv 2407.04153). A None among the layer's own settings is that of `preset`; the paper's stand here."""

    sites: str | tuple[str, ...] = "middle"
    """Where: `middle`, the feed-forward layer of the middle block (the paper, section 3.1; in an encoder-decoder that
    of the decoder); `all`; or paths and globs of feed-forward layers, of their blocks, or of any module that takes
    one tensor and gives one."""
    mode: Literal["replace", "parallel"] = "replace"
    """`replace`, the paper: instead of the layer at the site, which is kept aside for `disabled()` and `remove()`.
    `parallel`: beside it, with rows out of zero, so that the model starts as its backbone to the bit."""
    preset: Literal["paper", "peer_pytorch", "memory_plus"] = "paper"
    """Whose layer it is where the next fields are None, first values included: the paper's, what PEER-pytorch computes
    by default, or the memory layer of Berges et al. 2024."""
    num_experts: int | tuple[int, int] | None = None
    """N, a square number or a grid (n1, n2) of sub-keys (section 2.2). None: 1024 x 1024."""
    heads: int | None = None
    """h, the queries of a token, whose experts are summed (section 2.3). None: 8."""
    top_k: int | None = None
    """k, the experts that each head retrieves (Algorithm 1). None: 16; granularity G is h k = 128."""
    dim_key: int | None = None
    """d_k, the width of a head's query, both halves together (section 2.2). Not stated in the paper. None: 256, which
    keeps retrieval below the cost of a feed-forward layer; `peer_pytorch`: the width of the model."""
    gate: Literal["softmax", "sigmoid", "relu", "renormalised", "one"] | None = None
    """Of the retrieved scores, per head (equation 2; the text allows sigmoid too). None: softmax."""
    query_norm: Literal["batch", "past_batch", "layer", "rms", "l2", "none"] | None = None
    """Of queries (section 3.4, table 2). None: batch; it leaks across tokens in training, see the README."""
    key_norm: Literal["none", "layer", "rms", "l2"] | None = None
    """Of sub-keys. Not in the paper. None: none."""
    share_keys: bool | None = None
    """Whether heads share one set of sub-keys, as the paper's text says (section 2.3); the code that it points to has
    one for each head. None: shared."""
    activation: Literal["gelu", "gelu_tanh", "relu", "silu", "relu_squared"] | None = None
    """sigma of an expert (section 2.1); the paper names ReLU and GELU, not which was trained. None: gelu."""
    query_bias: bool | None = None
    """A bias of the query network. Not stated in the paper. None: none."""
    values_only: bool | None = None
    """Experts of one row, v: a product-key memory (Lample et al. 2019), the paper's baseline. None: neurons."""
    output_gate: bool | None = None
    """memory+'s W2 (y * silu(W1 x)) (Berges et al. 2024, section 3). Not in the paper. None: none."""
    gated: bool = False
    """Experts of three rows, sigma(<g, x>) <u, x> v, in place of two. Not in the paper."""
    row_dim: int | None = None
    """Width of the rows, with one projection in and one out; None, the paper: the width of the model."""
    shared_table: bool = False
    """One table for all sites, each with a router of its own (Berges et al. 2024, section 3). Not in the paper."""
    table_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the rows in memory and on disk. Not stated in the paper."""
    licence: str | None = None
    """Licence of what is trained here, as an SPDX name, for the card of a saved composition; None states none."""
    seed: int = 0
    """Of all first values. `mixwright train` passes the recipe's."""
    learning_rate: float = 1e-3
    """Of the rows, in both stages. Not stated in the paper; Berges et al. 2024 use 1e-3."""
    learning_rate_end: float = 1.0
    """Share of `learning_rate` that is left at the last step, falling linearly: rows may begin at 4 to 10 times the
    rate of the rest and end at it (Huang et al. 2024). Not in the paper."""
    table_optimizer: Literal["adamw", "lazy_adamw", "rowwise_adagrad"] = "lazy_adamw"
    """What learns the rows: AdamW over all of them; the same, exactly, at the cost of the retrieved ones; or row-wise
    Adagrad, with one number of state for each row part. Not stated in the paper."""
    router_learning_rate: float = 1e-3
    """Of queries, norms, sub-keys and projections. Not stated in the paper."""
    weight_decay: float = 0.0
    """Decoupled, of everything that learns. Not stated in the paper."""
    steps: int = 1000
    """Optimiser steps of stage *pretrain*. The paper trains whole models, within 6e18 or 2e19 floating-point
    operations."""
    distil_steps: int = 0
    """Optimiser steps of stage *distil*, which comes first and teaches a layer to say what the one that it replaced
    said; 0: there is no such stage. Not in the paper."""
    warmup: float = 0.06
    """Share of the steps in which the learning rates rise from 0. Not stated in the paper."""
    cooldown: float = 0.0
    """Share of the steps, the last ones, in which they fall back to 0. Not stated in the paper."""
    clip: float = 1.0
    """Largest global norm of a gradient. Not stated in the paper."""

    def __post_init__(self) -> None:
        faults = [*_unfit_counts(self), *_unfit_choices(self)]
        if faults:
            raise ValueError("; ".join(faults))

    @property
    def grid(self) -> tuple[int, int]:
        """(n1, n2)."""
        wanted = self.layer["num_experts"]
        side = math.isqrt(wanted) if isinstance(wanted, int) else 0
        return (side, side) if isinstance(wanted, int) else (wanted[0], wanted[1])

    @property
    def layer(self) -> dict[str, Any]:
        """The layer's own settings, those of the preset in place of None; `dim_key` None: the model's width."""
        preset = PRESETS[self.preset]
        return {name: preset[name] if getattr(self, name) is None else getattr(self, name) for name in preset}

    def settled(self) -> "PeerConfig":
        """The same with nothing left to the preset but a `dim_key` that is the width of the model."""
        return replace(self, **self.layer)


def _unfit_counts(config: PeerConfig) -> list[str]:
    """Numbers out of their range, in words."""
    least = {"heads": 1, "top_k": 1, "dim_key": 2, "row_dim": 1, "steps": 1, "distil_steps": 0, "seed": 0}
    faults = [
        f"{name}={value}: expected a whole number of at least {least[name]}"
        for name in least
        if (value := getattr(config, name)) is not None and value < least[name]
    ]
    positive = ("learning_rate", "router_learning_rate", "learning_rate_end", "clip")
    faults += [f"{name}={value}: expected more than 0" for name in positive if not (value := getattr(config, name)) > 0]
    if config.weight_decay < 0:
        faults.append(f"weight_decay={config.weight_decay}: expected 0 or more")
    if not all(0 <= share <= 1 for share in (config.warmup, config.cooldown)) or config.warmup + config.cooldown > 1:
        faults.append(
            f"warmup={config.warmup}, cooldown={config.cooldown}: expected shares of the steps, together <= 1"
        )
    return faults


def _unfit_choices(config: PeerConfig) -> list[str]:
    """Settings that do not go together, in words."""
    faults = list[str]()
    wanted, top_k = config.layer["num_experts"], config.layer["top_k"]
    sides = (wanted,) if isinstance(wanted, int) else wanted
    if any(side < 1 for side in sides):
        faults.append(f"num_experts={wanted}: expected 1 or more")
    elif isinstance(wanted, int) and math.isqrt(wanted) ** 2 != wanted:
        side = math.isqrt(wanted)
        faults.append(
            f"num_experts={wanted}: expected a square number, such as {side**2} or {(side + 1) ** 2}, or a grid of "
            "sub-keys [n1, n2]"
        )
    elif top_k > config.grid[0] * config.grid[1]:
        faults.append(f"top_k={top_k}: expected at most the {config.grid[0] * config.grid[1]} experts")
    if config.gated and config.layer["values_only"]:
        faults.append("gated=true: values_only experts have one row and nothing to gate; leave one of them out")
    if config.dim_key is not None and config.dim_key % 2:
        faults.append(f"dim_key={config.dim_key}: expected an even number, one half for each axis of the grid")
    sites = (config.sites,) if isinstance(config.sites, str) else config.sites
    if not sites or any(not site.strip() for site in sites):
        faults.append("sites: expected 'middle', 'all', or paths or globs")
    if config.mode == "parallel" and config.distil_steps:
        faults.append(
            f"distil_steps={config.distil_steps}: mode='parallel' keeps the layer, so that there is nothing to teach; "
            "leave it out, or choose mode='replace'"
        )
    return faults


METHOD = Method(
    name="peer",
    trains="composition",
    summary="a layer of up to a million single-neuron experts, of which each token finds its own by product keys",
    config=PeerConfig,
    paper=Paper(
        title="Mixture of A Million Experts",
        authors="Xu Owen He",
        year=2024,
        arxiv="2407.04153",
        bibtex="""@misc{he2024mixture,
  title = {Mixture of A Million Experts},
  author = {He, Xu Owen},
  year = {2024},
  eprint = {2407.04153},
  archivePrefix = {arXiv},
  primaryClass = {cs.LG},
  url = {https://arxiv.org/abs/2407.04153}
}""",
    ),
)
