"""TensorPoly's card and its configuration, with the whole family: LoRA, Poly, MHR, TLoRA, TensorPoly-I and -II."""

from dataclasses import dataclass, replace
from typing import Literal

from mixwright.methods.base import Method, Paper

Kind = Literal["lora", "poly", "mhr", "tlora", "tensorpoly-1", "tensorpoly-2", "entangled"]

MATRIX: tuple[Kind, ...] = ("lora", "poly", "mhr")
"""Kinds that store A and B as they are; the others store leaves of tensor products."""
UNROUTED: tuple[Kind, ...] = ("lora", "tlora")
"""Kinds that know no tasks: every row of a batch gets the same update."""
ORDERED: tuple[Kind, ...] = ("tensorpoly-2", "entangled")
"""Kinds that choose anew for every order position."""
MAX_ORDER = 4
"""The authors define orders 2 and 4; 1 is Poly and 3 their natural continuation."""


@dataclass(frozen=True, kw_only=True)
class TensorPolyConfig:
    """Su et al. 2024 (arXiv 2405.16671); symbols are the paper's, and Poly's and MHR's where it builds on them."""

    tasks: tuple[str, ...] = ()
    """Names of the T tasks in the order of their ids, the rows of Z (Poly, section 3). `lora` and `tlora` need none."""
    experts: Kind = "tensorpoly-1"
    """Which member of the family. `lora`; `poly` (Ponti et al. 2022): S LoRAs whose A and B are averaged apart; `mhr`
    (Caccia et al. 2023): the same in H blocks that choose for themselves; `tlora`: columns of A and B are sums of R
    tensor products; `tensorpoly-1` (the paper's best): these R terms are chosen per task; `tensorpoly-2`: the leaves
    of every order position are; `entangled` (ours): `tensorpoly-2` as a sum of G products, which repairs it."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Sites, by last name part or glob; the paper adapts q, k, v, o, wi_0, wi_1 and wo, every linear layer of a T5."""
    rank: int | None = None
    """r, the columns of A; the update is scaled by 1 / r. None, the paper's: 16 for tensors; 1 for lora, poly, mhr."""
    num_latent: int | None = None
    """R (tensors) or S (poly, mhr), the latent experts. None: 8, the paper's; 1 for lora and tlora, 2 for entangled."""
    order: int = 2
    """N, the leaves of a tensor product, 1 to 4 (the paper: 2 or 4). A matter of the tensor kinds only."""
    heads: int | None = None
    """H of mhr: blocks of a width that choose apart; divides every width. None: 64 for mhr as published, else 1."""
    groups: int | None = None
    """G of entangled: products that are summed; a column has rank G at most. None: 4, and 1 for every other kind."""
    factorization: Literal["ceil", "exact"] = "ceil"
    """Leaf widths q. `ceil`, the paper: all ceil(d ** (1/N)), and the product is cut to d, so that some entries may
    never be read. `exact`: factors of d itself, nothing is cut."""
    init: Literal["matched", "released"] = "matched"
    """`matched`, ours: leaves of the variance that a LoRA's A has, the last leaf of B zero, so that the model starts as
    its backbone. `released`: the authors' uniform leaves, under which it starts near it. See `initial.py`."""
    norm: Literal["none", "pair"] | None = None
    """Layer norm on the products of pairs of leaves, before the cut and without weights of its own, as in the authors'
    code. None: `pair` with `init="released"`, `none` with `matched`, which needs no gain."""
    share: Literal["layer", "block", "model"] = "layer"
    """Who shares a row of Z: each linear layer has its own (the paper's `finegrained`), a block, or the whole model."""
    noise: bool = False
    """Relaxed-Bernoulli noise on Z in training (Poly, equation 4). The published runs have it off."""
    straight_through: bool = False
    """Gates are rounded to 0 or 1, with the gradient of what was rounded."""
    temperature: float = 1.0
    """tau of the noise (Poly, equation 4)."""
    licence: str | None = None
    """Licence of what is trained here, as an SPDX name, for the card of a saved composition; None states none."""
    seed: int = 0
    """Of the first values of leaves and Z. `mixwright train` passes the recipe's."""
    learning_rate: float = 1e-3
    """Of the experts in stage *multitask*. The authors' code says 1e-3 and applies 3e-4 to tensors by a slip."""
    router_learning_rate: float = 0.1
    """Of Z, in both stages: far higher than that of the experts, which keeps routing from staying uniform."""
    steps: int = 1000
    """Optimiser steps of stage *multitask*; the paper: 100 000."""
    warmup: float = 0.06
    """Share of the steps in which the learning rates rise from 0."""
    cooldown: float = 0.94
    """Share of the steps, the last ones, in which they fall back to 0, linearly."""
    clip: float = 1.0
    """Largest global norm of a gradient."""
    transfer_learning_rate: float = 3e-3
    """Of the experts in stage *transfer*."""
    transfer_steps: int = 1000
    """Optimiser steps of stage *transfer*."""
    transfer: Literal["all", "router", "experts", "auto"] = "auto"
    """What a new task trains: everything; its row of Z alone (`-z`); the experts under uniform routing (`-mu`); or
    what k-fold validation on its shots prefers."""
    start: Literal["fresh", "mean", "source", "auto"] = "auto"
    """Row of Z with which a new task starts: fresh near zero (the paper), the mean of the sources, the source task that
    fits its shots best, or what k-fold validation prefers."""
    folds: int = 4
    """k of that validation."""
    mutual_information: float = 0.0
    """Weight of usage entropy minus per-task entropy, which is made large: tasks choose sharply, and not all the same.
    Not in the paper; 0 is off, here and below."""
    orthogonality: float = 0.0
    """Weight of the overlap between latent experts, from the cosines of their leaves. Not in the paper."""
    sparsity: float = 0.0
    """Weight of relu(mean sigmoid(Z) - 1 / R), an L1 penalty that leaves one expert per task free. Not in the paper."""
    ibp: float = 0.0
    """Weight of the Indian-buffet-process prior on Z (Poly, appendix). Off in the published runs."""

    def __post_init__(self) -> None:
        faults = [*_unfit_counts(self), *_unfit_choices(self)]
        if faults:
            raise ValueError("; ".join(faults))

    @property
    def is_routed(self) -> bool:
        """Whether tasks choose."""
        return self.experts not in UNROUTED

    def settled(self) -> "TensorPolyConfig":
        """The same with nothing left open: every None that has a default by kind is that default."""
        matrix, entangled, mhr = self.experts in MATRIX, self.experts == "entangled", self.experts == "mhr"
        latent = 1 if self.experts in UNROUTED else 2 if entangled else 8
        return replace(
            self,
            rank=self.rank or (1 if matrix else 16),
            num_latent=self.num_latent or latent,
            order=1 if matrix else self.order,
            heads=self.heads or (64 if mhr else 1),
            groups=self.groups or (4 if entangled else 1),
            norm=self.norm or ("pair" if self.init == "released" and not matrix and self.order > 1 else "none"),
        )


def _unfit_counts(config: TensorPolyConfig) -> list[str]:
    """Numbers out of their range, in words."""
    least = {"rank": 1, "num_latent": 1, "heads": 1, "groups": 1, "steps": 1, "transfer_steps": 1, "folds": 2}
    least |= {"order": 1}
    values = {name: getattr(config, name) for name in least}
    faults = [
        f"{name}={value}: expected a whole number of at least {least[name]}"
        for name, value in values.items()
        if value is not None and value < least[name]
    ]
    if config.order > MAX_ORDER:
        faults.append(f"order={config.order}: expected 1 to {MAX_ORDER}, the leaves of one tensor product")
    positive = ("temperature", "learning_rate", "router_learning_rate", "transfer_learning_rate")
    positive += ("clip",)
    faults += [f"{name}={value}: expected more than 0" for name in positive if not (value := getattr(config, name)) > 0]
    shares = (config.warmup, config.cooldown)
    if not all(0 <= share <= 1 for share in shares) or sum(shares) > 1 + 1e-9:
        faults.append(
            f"warmup={config.warmup}, cooldown={config.cooldown}: expected shares of the steps, together <= 1"
        )
    if config.seed < 0:
        faults.append(f"seed={config.seed}: expected 0 or more")
    return faults


def _unfit_choices(config: TensorPolyConfig) -> list[str]:
    """Settings that do not go together, in words."""
    kind, faults = config.experts, list[str]()
    matrix = kind in MATRIX
    twice = sorted({task for task in config.tasks if config.tasks.count(task) > 1})
    if twice:
        faults.append(f"tasks: {twice[0]!r} stands there twice; every task has one name of its own")
    if any(not task.strip() for task in config.tasks):
        faults.append("tasks: one name is empty")
    if kind == "lora" and config.num_latent not in (None, 1):
        faults.append(f"num_latent={config.num_latent}: lora is one expert; choose poly for several")
    if kind != "mhr" and config.heads not in (None, 1):
        faults.append(f"heads={config.heads}: {kind} has one head; only mhr has several")
    if kind != "entangled" and config.groups not in (None, 1):
        faults.append(f"groups={config.groups}: {kind} has one group; only entangled has several")
    if matrix and config.order not in (1, TensorPolyConfig.order):
        faults.append(f"order={config.order}: {kind} has no tensor products; leave order out or choose a tensor kind")
    if config.norm == "pair" and (matrix or config.order == 1):
        faults.append(
            f"norm='pair': {'order 1' if not matrix else kind} has no pairs of leaves to normalise; norm='none'"
        )
    if matrix and config.factorization == "exact":
        faults.append(f"factorization='exact': {kind} has no leaves; leave it out or choose a tensor kind")
    return faults


METHOD = Method(
    name="tensorpoly",
    trains="composition",
    summary="trains latent experts, rank terms of tensor products, together on many tasks; each task has its own mix",
    config=TensorPolyConfig,
    paper=Paper(
        title="Mixture of Latent Experts Using Tensor Products",
        authors="Zhan Su, Fengran Mo, Prayag Tiwari, Benyou Wang, Jian-Yun Nie, Jakob Grue Simonsen",
        year=2024,
        arxiv="2405.16671",
        bibtex="""@misc{su2024mixture,
  title = {Mixture of Latent Experts Using Tensor Products},
  author = {Su, Zhan and Mo, Fengran and Tiwari, Prayag and Wang, Benyou and Nie, Jian-Yun and Simonsen, Jakob Grue},
  year = {2024},
  eprint = {2405.16671},
  archivePrefix = {arXiv},
  primaryClass = {cs.CL},
  url = {https://arxiv.org/abs/2405.16671}
}""",
    ),
)
