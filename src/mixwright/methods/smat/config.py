"""The method's card and its configuration."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from mixwright.methods.base import Method, Paper
from mixwright.recipe import Count, EpisodeConfig

Share = Annotated[float, Ge(0), Le(1)]
Rate = Annotated[float, Ge(0)]


@dataclass(frozen=True, kw_only=True)
class SmatConfig:
    """Chen et al. 2024 (arXiv 2403.08477); symbols and defaults are the paper's, of its ViT-S runs."""

    experts: Count = 8
    """M, the sparse experts: masks over one shared change."""
    sparsity: Share = 0.9
    """tau: the share of weights that each expert must leave as pretrained."""
    features: Literal["auto", "cls", "pooled", "mean", "custom"] = "auto"
    """What of the backbone's output is an item's vector; see `composition.features`. `mw.compose` takes a function of
    the model and the inputs as well, which is written down as `custom`."""
    feature_width: Count | None = None
    """Width of the features, where the backbone's config does not tell."""
    include: tuple[str, ...] = ("*",)
    """Globs over parameter names: what may change."""
    exclude: tuple[str, ...] = ()
    """Globs over parameter names: what stays as pretrained."""
    granularity: Literal["weight", "row", "tensor"] = "weight"
    """What a mask decides about: each weight (the paper), each row of a tensor, or each tensor."""
    seed: Annotated[int, Ge(0)] = 0
    """Of masks, keys and tokens."""
    storage: Literal["exact", "compact"] = "exact"
    """How a pool is saved. exact: the same weights to the bit. compact, about half: the change in float16, masks
    between 0 and 1 at 256 levels; what is loaded is then that, and saved again to the same bytes."""

    episodes: EpisodeConfig = EpisodeConfig()
    """Which episodes are drawn; the defaults are Meta-Dataset's (Triantafillou et al. 2020)."""

    masks: Literal["learned", "all", "random", "given"] = "learned"
    """`learned` (the paper); `all`: every weight that may change does, and with one expert that is P>M>F; `random`:
    each weight at odds 1 - `sparsity`, once for all; `given`: what `fresh.set_masks` is told. Only learned masks move,
    and only they have a constraint."""
    changes: Literal["shared", "own"] = "shared"
    """One change for all experts, under masks (the paper); or each has its own, whole, and there are no masks: soft
    merging."""
    mask_noise: bool = False
    """Draw masks with concrete noise in training, as Louizos et al. do; the released code does not."""
    regrowth: Rate = 0.0
    """The slope with which masks at 0 and at 1 still feel the task; 0, as in the paper, lets no dead one come back."""
    router: Literal["support", "uniform"] = "support"
    """Whether the support set chooses, or all experts count alike."""
    mixture: Literal["whole", "block"] = "whole"
    """What a mixture holds for: the whole backbone (the paper), or each of its blocks, of which the support set then
    chooses one by one; parameters outside blocks have one together. See `experts.block_of`."""

    scale: Annotated[float, Gt(0)] = 10.0
    """What cosines to prototypes are multiplied with."""
    inner_rate: Rate = 1e-3
    """Learning rate of the inner step on the support set, first order; 0 leaves it out."""
    distillation: Share = 0.25
    """Share of the loss that is distillation."""
    from_teacher: bool = True
    """Distil from the dense teacher: the adapted weights after one step on the queries."""
    from_pretrained: bool = True
    """Distil from the pretrained model's own prototypes."""
    teacher_rate: Rate = 0.005
    """Learning rate of the teacher's step."""
    distillation_temperature: Annotated[float, Gt(0)] = 2.0
    """T of both distillation terms."""
    distilled: Annotated[float, Gt(0), Le(1)] = 1.0
    """Share of each episode's queries, drawn anew, that distillation is estimated from: 1 is the paper, less is the
    same in the mean and takes less time (README, Training)."""
    gate_penalty: Rate = 1e-4
    """Weight of the mean square of the gate logits."""
    floor: Share = 0.1
    """Share of uniform weights in what an expert counts in the sparsity constraint; the paper has 0, and an expert that
    is never chosen then stays dense."""
    diversity: Rate = 0.0
    """Weight of the term that pushes experts' masks apart (`diversity_term`); the paper has none."""
    annealed: Share = 0.0
    """Share of the steps over which the sparsity that is asked for rises from 0 to `sparsity`; the paper has 0."""
    at_once: Count = 4
    """Episodes of an update whose weights are merged in one pass over the masks, and learned from in one: quicker, and
    each holds a copy of the weights that may change. 1 takes the least memory."""
    frozen_cache: Annotated[int, Ge(0)] = 0
    """How many items' frozen features are kept, by the items' content: worth it where episodes are not augmented."""

    steps: Count = 12500
    """Updates of stage *meta-tune*; the paper has 4 episodes in each (`train.accumulate`)."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Of the shared change; SGD has momentum 0.9."""
    learning_rate: Rate = 1e-4
    """Of the shared change."""
    weight_decay: Rate = 1e-4
    """Of the shared change; AdamW's is decoupled."""
    mask_learning_rate: Rate = 0.046
    """Of the mask logits, by SGD, times their number (the paper's 1e6 for 21.7 M), times 12 500 / `steps`."""
    multiplier_learning_rate: Rate = 2e-3
    """Of the Lagrange multipliers, times 12 500 / `steps`: short runs have to reach the same sparsity."""
    router_learning_rate: Rate = 1e-4
    """Of the router, by AdamW with weight decay 0.01."""
    warmup: Share = 0.1
    """Share of the steps in which all learning rates rise."""
    cooldown: Share = 0.9
    """Share of the steps in which they fall, by half a cosine."""

    def __post_init__(self) -> None:
        if self.mixture == "block" and (not self.routes or self.changes == "own"):
            raise ValueError(
                "mixture 'block': a support set chooses it among two sparse experts or more; it goes with experts > 1, "
                "router 'support' and changes 'shared'."
            )
        if self.diversity and not (self.is_constrained and self.experts > 1):
            raise ValueError(
                f"diversity {self.diversity}: it pushes masks apart that learn; it goes with experts > 1, masks "
                "'learned' and changes 'shared'."
            )

    @property
    def mask_unit(self) -> Literal["weight", "row", "tensor"]:
        """What the masks that are held decide about: where none leaves anything out, one number a tensor will do."""
        return "tensor" if self.masks == "all" else self.granularity

    @property
    def is_constrained(self) -> bool:
        """Whether there are masks that learn, and have to be sparse."""
        return self.changes == "shared" and self.masks == "learned"

    def sparsity_at(self, progress: float) -> float:
        """What is asked for when this share of the training is done."""
        return self.sparsity if progress >= self.annealed else self.sparsity * progress / self.annealed

    @property
    def distils(self) -> bool:
        """Whether there is anything to distil from."""
        return self.distillation > 0 and (self.from_teacher or self.from_pretrained)

    @property
    def routes(self) -> bool:
        """Whether there is anything to choose, and a router to choose it."""
        return self.experts > 1 and self.router == "support"


METHOD = Method(
    name="smat",
    trains="composition",
    reads="episodes",
    summary="sparse interpolated experts, chosen from a support set: few-shot classification out of distribution",
    config=SmatConfig,
    paper=Paper(
        title="Unleashing the Power of Meta-tuning for Few-shot Generalization Through Sparse Interpolated Experts",
        authors="Shengzhuang Chen, Jihoon Tack, Yunqiao Yang, Yee Whye Teh, Jonathan Richard Schwarz, Ying Wei",
        year=2024,
        arxiv="2403.08477",
        bibtex="""@inproceedings{chen2024unleashing,
  title = {Unleashing the Power of Meta-tuning for Few-shot Generalization Through Sparse Interpolated Experts},
  author = {Chen, Shengzhuang and Tack, Jihoon and Yang, Yunqiao and Teh, Yee Whye and Schwarz, Jonathan Richard and
            Wei, Ying},
  booktitle = {International Conference on Machine Learning},
  year = {2024},
  eprint = {2403.08477},
  archivePrefix = {arXiv},
  url = {https://arxiv.org/abs/2403.08477}
}""",
    ),
)
