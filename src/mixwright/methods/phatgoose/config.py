"""PHATGOOSE's card and its configuration; the defaults are the paper's."""

from dataclasses import dataclass
from typing import Literal

from mixwright.methods.base import Method, Paper


@dataclass(frozen=True, kw_only=True)
class PhatgooseConfig:
    """Muqeeth et al. 2024. Symbols and sections are the paper's."""

    top_k: int = 2
    """k, the experts kept for each token and site (section 3)."""
    router: Literal["auto", "gates", "signatures", "arrow"] = "auto"
    """What experts are scored by. `gates` is the paper; `auto` takes gates where every expert has them, else
    signatures where every expert has them, else Arrow, which needs nothing but the adapters."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Sites of a new expert, by last name part or glob; the paper adapts every linear layer of every block."""
    rank: int = 16
    """r of a new expert (section 4.1)."""
    alpha: float = 1.0
    """The update is scaled by alpha / r; the released code has 1 / r. Tiny models want alpha = r."""
    learning_rate: float = 5e-3
    """Of AdamW, for both stages (appendix)."""
    warmup: float = 0.06
    """Share of the steps in which the learning rate rises from 0; constant afterwards."""
    clip: float = 1.0
    """Largest global norm of a gradient."""
    expert_steps: int = 1000
    """Optimiser steps of stage *expert*."""
    gate_steps: int = 100
    """Optimiser steps of stage *gate*."""
    consensus: float = 0.0
    """beta: weight of what earlier sites decided for the same token. Not in the paper; 0 is the paper."""
    pooling: float = 0.0
    """Decay of a running mean of the scores over earlier tokens. Not in the paper; 0 is the paper."""
    prior: float = 0.0
    """Weight of what earlier tokens of the sequence decided. Not in the paper; 0 is the paper."""
    null_expert: float | None = None
    """Score of the backbone itself as one more expert. Not in the paper; None is the paper."""
    quality: float = 0.0
    """Weight of an expert's measured gain (nats per token) as an offset on its scores. Not in the paper; 0 is."""


METHOD = Method(
    name="phatgoose",
    summary="routes every token, at every layer, among LoRA experts trained apart; gates learned post hoc",
    config=PhatgooseConfig,
    paper=Paper(
        title="Learning to Route Among Specialized Experts for Zero-Shot Generalization",
        authors="Mohammed Muqeeth, Haokun Liu, Yufan Liu, Colin Raffel",
        year=2024,
        arxiv="2402.05859",
        bibtex="""@inproceedings{muqeeth2024learning,
  title = {Learning to Route Among Specialized Experts for Zero-Shot Generalization},
  author = {Muqeeth, Mohammed and Liu, Haokun and Liu, Yufan and Raffel, Colin},
  booktitle = {Proceedings of the 41st International Conference on Machine Learning},
  series = {Proceedings of Machine Learning Research},
  volume = {235},
  year = {2024},
  url = {https://arxiv.org/abs/2402.05859}
}""",
    ),
)
