"""Manticore's card and its configuration."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from mixwright.methods.base import Method, Paper

Count = Annotated[int, Gt(0)]
Steps = Annotated[int, Ge(0)]
Rate = Annotated[float, Gt(0)]


@dataclass(frozen=True, kw_only=True)
class ManticoreConfig:
    """Roberts et al. 2024 (arXiv 2406.00894). Defaults are the paper's."""

    num_blocks: Count = 1
    """K: blocks into which every component is cut, each a run of consecutive layers. The headline results have 1."""
    projectors: Literal["linear", "identity", "least_squares", "mlp", "none"] = "linear"
    """Maps between the stream and a component: affine with the framework's initial values (the paper), affine started
    at the identity (padded), the same fitted by least squares, two layers with GELU, or none but padding."""
    rows: Literal["own", "block"] = "own"
    """Mixture weights of embedding and head: rows of their own, or block 0's for both, as in the paper."""
    weights: Literal["static", "sequence", "token"] = "static"
    """Mixture weights that do not vary (the paper), or that depend on the input, per sequence or per token (ours)."""
    prefix: Count = 16
    """Tokens after which a sequence has its own mixture weights, with weights=sequence; until then it has the static
    ones."""
    layers: tuple[tuple[int, ...], ...] | None = None
    """Layers that each component has in each block, where `export` cut the others away; None: equal runs."""
    names: tuple[str, ...] | None = None
    """Names of the components, in order; None: the last part of their paths."""
    mixture_weights: tuple[tuple[float, ...], ...] | None = None
    """K rows of mixture weights to start from, or to keep where nothing is searched; None: uniform."""
    shared_vocabulary: bool = False
    """Whether components of other tokenizers than the first one's are given its vocabulary, with new embeddings and
    heads out of their old rows, for *align* to train (ours; the paper draws new ones for every component). Otherwise
    they are refused."""
    vocab_size: Count | None = None
    """Columns of the logits; None: the rows of the smallest head. The tokenizer's length leaves out rows of padding."""
    licences: dict[str, str] | None = None
    """SPDX id or expression of a component's licence, by its name, where its folder does not say it or says it wrong.
    Composing and running ask for none; a hybrid with a component whose licence is unknown is not saved."""
    seed: Annotated[int, Ge(0)] = 0
    """Where the projectors' initial values start."""
    search: Literal["darts", "alternating", "bilevel", "gaea", "gumbel", "drnas", "grid", "halving"] = "darts"
    """How mixture weights are found."""
    align_steps: Steps = 1000
    """Optimiser steps of stage *align*."""
    align_learning_rate: Rate = 2e-4
    """Of projectors while the components are frozen."""
    search_steps: Steps = 1000
    """Optimiser steps of stage *search*."""
    tune_steps: Steps = 1000
    """Optimiser steps of stage *tune*."""
    discretise_steps: Steps = 0
    """Optimiser steps of stage *discretise*; 0 leaves the hybrid soft."""
    learning_rate: Rate = 2e-4
    """Of components and projectors, in search and tune."""
    weights_learning_rate: Rate = 0.01
    """Of mixture logits."""


METHOD = Method(
    name="manticore",
    trains="composition",
    backbones="several",
    summary="one language model out of several of different architectures: projectors and mixture weights per block",
    config=ManticoreConfig,
    paper=Paper(
        title="Pretrained Hybrids with MAD Skills",
        authors="Nicholas Roberts, Samuel Guo, Zhiqi Gao, Satya Sai Srinath Namburi GNVV, Sonia Cromp, Chengjun Wu, "
        "Chengyu Duan, Frederic Sala",
        year=2024,
        arxiv="2406.00894",
        bibtex="""@misc{roberts2024pretrained,
  title = {Pretrained Hybrids with {MAD} Skills},
  author = {Roberts, Nicholas and Guo, Samuel and Gao, Zhiqi and GNVV, Satya Sai Srinath Namburi and Cromp, Sonia and
            Wu, Chengjun and Duan, Chengyu and Sala, Frederic},
  year = {2024},
  eprint = {2406.00894},
  archivePrefix = {arXiv},
  primaryClass = {cs.LG},
  url = {https://arxiv.org/abs/2406.00894}
}""",
    ),
)
