"""Manticore's card and its configuration."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from mixwright.methods.base import Method, Paper

Count = Annotated[int, Gt(0)]
Steps = Annotated[int, Ge(0)]
Rate = Annotated[float, Gt(0)]
Share = Annotated[float, Ge(0)]


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
    """K rows of mixture weights to be kept: programming, from metadata or from small proxy tasks; nothing is searched
    then. None: uniform at first."""
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
    inspect: bool = True
    """Whether stage *inspect* looks at licences, tokenizers, context limits and cost before anything is trained."""
    gates: Literal["warn", "stop"] = "warn"
    """What a gate that is not passed does: it is written down either way."""
    align_steps: Steps = 1000
    """Optimiser steps of stage *align*; 0 leaves it out, for hybrids whose components were never trained."""
    align_learning_rate: Rate = 2e-4
    """Of projectors while the components are frozen."""
    align: Literal["full", "output"] = "full"
    """What is aligned: both projectors of every component (the paper), or those behind it alone, so that with one block
    nothing that a component reads ever changes and what it says can be kept. Ours."""
    align_weights: bool = False
    """Whether mixture weights move while aligning, as in the released code; search starts from fresh ones all the
    same."""
    align_cache: Literal["auto", "off", "memory", "disk"] = "auto"
    """Where *align* keeps what frozen components say, where nothing before them changes (`align=output`, one block,
    static weights); auto: in memory if it fits and every example is met twice, else nowhere."""
    align_cache_gib: Rate = 4.0
    """The most that is kept."""
    align_tolerance: Share = 0.5
    """Gate of *align*: nats per token that the aligned hybrid may be worse than the best component."""
    search: Literal["darts", "alternating", "bilevel", "gaea", "gumbel", "drnas", "grid", "halving"] = "darts"
    """How mixture weights are found. darts (the paper): together with all else, on the same batches; alternating: in
    every second step; bilevel: on `data.validation`; gaea: exponentiated gradient; gumbel: one draw in a pass (DASH);
    drnas: Dirichlet; grid: every point of a grid trained; halving: successive halving over one component per block."""
    search_steps: Steps = 1000
    """Optimiser steps of stage *search*; of each point of a grid, and of halving's last round."""
    weights_learning_rate: Rate | None = None
    """Of mixture logits. None: 0.01 of AdamW, the paper's; 0.1 of the exponentiated gradient, that of GAEA's code."""
    weights_delay: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of the search in which mixture weights stand still; 0.1 to 0.2 keeps a weak start from being amplified."""
    temperature_end: Rate = 1.0
    """Temperature of the mixture weights' softmax at the end of the search, from 1: below 1 it drives them apart."""
    cost: Share = 0.0
    """lambda: what the share of all components' FLOPs that the mixture weights ask for adds to the search's loss.
    Ours."""
    tune_steps: Steps = 1000
    """Optimiser steps of stage *tune*; 0 leaves it out."""
    rewind: bool = True
    """Whether *tune* starts from pretrained components and aligned projectors again (the paper), or goes on."""
    train_components: bool = True
    """Whether components learn in search, tune and discretise; without, only what joins them does. Frozen components
    want mixture weights that depend on the input: static ones lost a skill."""
    discretise_steps: Steps = 0
    """Optimiser steps after each block was cut to its largest weight; 0 leaves the hybrid soft."""
    discretise_tolerance: Share = 0.1
    """Gate of *discretise*: nats per token that it may be worse than the soft hybrid."""
    learning_rate: Rate = 2e-4
    """Of components and projectors, in search, tune and discretise."""
    weight_decay: Share = 0.01
    """Decoupled, of components and projectors."""
    warmup: Annotated[float, Ge(0), Le(1)] = 0.0
    """Share of a stage's steps in which learning rates rise."""
    cooldown: Annotated[float, Ge(0), Le(1)] = 1.0
    """Share in which they fall to zero, linearly."""
    choose_every: Count = 100
    """Steps between looks at `data.validation`; the best weights are kept."""
    evaluate: bool = True
    """Whether stage *evaluate* compares what was made with single components and their ensemble."""
    controls: Literal["none", "tokens", "flops"] = "tokens"
    """What the components get before they are compared with: nothing, as many steps as stage *tune* had, or those and,
    apart, as many FLOPs. Not in the paper, whose reviewers asked for it."""
    accept_difference: float | None = None
    """What *evaluate* accepts: the hybrid's loss less that of the best single component, in nats per token, at most."""
    accept_discretised: float | None = None
    """The same for the discretised hybrid less the soft one."""
    accept_cost: Rate | None = None
    """FLOPs per token of what is handed over, over those of the best single component, at most."""


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
