"""The contenders: how each is meta-tuned, through the product's own stage, and what it serves for a support set.

All see the same episodes in the same order, with the same optimiser and rate for what they may change. P>M>F is one
expert without masks and without distillation; rows that say where it may act (by hand, by Fisher information, by its
own largest changes) are trained as it is. Random masks and soft merging have SMAT's loss.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

import mixwright as mw
from benchmarks.few_shot_backbone import pixels
from benchmarks.few_shot_exam import PER_CLASS, QUERIES, SUPPORT, WAYS, Weights
from benchmarks.few_shot_glyphs import Pictures
from mixwright.data.domains import tensor_domain
from mixwright.data.episode_batches import episode_batches
from mixwright.data.episode_samplers import VariableEpisodes
from mixwright.data.episodes import EpisodeSource
from mixwright.methods.smat.config import SmatConfig
from mixwright.methods.smat.episode_loss import EpisodeLoss
from mixwright.methods.smat.fresh import set_masks
from mixwright.methods.smat.model import FewShotModel
from mixwright.methods.smat.recipe import groups, stages
from mixwright.ops.prototypes import class_means, cosine_scores
from mixwright.recipe import TrainConfig
from mixwright.routing import Condition, Routing, SupportSet
from mixwright.training.fit import fit

State = dict[str, Tensor]


@dataclass(frozen=True)
class Budget:
    """How long every contender is meta-tuned, and on what."""

    tasks: int = 1000
    accumulate: int = 2
    rate: float = 1e-3
    experts: int = 4
    snapshots: tuple[int, ...] = (100, 250, 500)
    fisher_tasks: int = 100

    @property
    def steps(self) -> int:
        return self.tasks // self.accumulate


@dataclass(frozen=True)
class Row:
    """A contender: settings of the method, and where its masks are from if they are given."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    masks_of: str = ""
    """`fisher`, or the name of the row whose largest changes are kept."""
    times: int = 1
    """It learns from so many times the budget's tasks."""

    def budget(self, usual: Budget) -> Budget:
        """How long it is meta-tuned."""
        snapshots = tuple(self.times * count for count in usual.snapshots)
        return replace(usual, tasks=self.times * usual.tasks, snapshots=snapshots)

    def config(self, usual: Budget, seed: int) -> SmatConfig:
        """The method's settings."""
        budget = self.budget(usual)
        shared = {
            "features": "cls",
            "experts": budget.experts,
            "steps": budget.steps,
            "optimizer": "adamw",
            "learning_rate": budget.rate,
            "weight_decay": 0.0,
            "router_learning_rate": 1e-3,
            "multiplier_learning_rate": 1e-2,
            "seed": seed,
        }
        return SmatConfig(**(shared | dict(self.settings)))


ONE: dict[str, Any] = {"experts": 1, "masks": "all"}
GIVEN: dict[str, Any] = {"experts": 1, "masks": "given"}
PLAIN: dict[str, Any] = {"distillation": 0.0, "inner_rate": 0.0}
PMF, PMF_KD, SMAT = "P>M>F", "P>M>F + distillation", "SMAT"
MAIN = (
    Row(PMF, ONE | PLAIN),
    Row(SMAT),
    Row(PMF_KD, ONE),
    Row("random masks", {"masks": "random"}),
    Row("post-hoc sparse", GIVEN | PLAIN, masks_of=PMF),
    Row("Fisher mask", GIVEN | PLAIN, masks_of="fisher"),
    Row("soft merging", {"changes": "own"}),
    Row("biases only", ONE | PLAIN | {"include": ("*.bias",)}),
    Row("LayerNorms only", ONE | PLAIN | {"include": ("*layernorm*",)}),
    Row("attention only", ONE | PLAIN | {"include": ("*attention*",)}),
)
MORE = (
    Row("SMAT, no distillation", {"distillation": 0.0}),
    Row("SMAT, sparsity .5", {"sparsity": 0.5}),
    Row("SMAT, sparsity rises", {"annealed": 0.5}),
    Row("SMAT, sparsity .8", {"sparsity": 0.8}),
    Row("SMAT, sparsity .95", {"sparsity": 0.95}),
    Row("SMAT, masks come back", {"regrowth": 0.1}),
    Row("SMAT, 8 experts", {"experts": 8}),
)
APART: dict[str, Any] = {"diversity": 0.3}
ROUTED = (
    Row("SMAT, experts apart", APART),
    Row("SMAT, mixtures per layer", {"mixture": "block"}),
    Row("SMAT, both", APART | {"mixture": "block"}),
)
"""Not of the paper; about what the router chooses among, so measured as it chooses."""
LONG = (
    Row(f"{PMF}, 4 x tasks", ONE | PLAIN, times=4),
    Row(f"{SMAT}, 4 x tasks", times=4),
    Row(f"{PMF_KD}, 4 x tasks", ONE, times=4),
    Row("post-hoc sparse, 4 x tasks", GIVEN | PLAIN, masks_of=f"{PMF}, 4 x tasks", times=4),
)
"""Learning that goes on until it has nearly converged."""


@dataclass
class Trained:
    """A row after meta-tuning: the model, its state at some numbers of tasks, and what it cost."""

    model: FewShotModel
    snapshots: dict[int, State]
    cpu_seconds: float
    loss: float

    @property
    def is_fixed(self) -> bool:
        """Whether its weights are the same for every support set."""
        return len(self.model.router.keys) == 1

    @property
    def names(self) -> Sequence[str]:
        """The parameters that may change."""
        experts: Any = self.model.mixture.experts
        return experts.names

    def uniform(self, strength: float = 1.0) -> Weights:
        """The weights with all experts alike."""
        count = len(self.model.router.keys)
        with torch.no_grad():
            return self.model.weights_for(Routing(torch.full((count,), 1 / count), count), strength)

    @torch.no_grad()
    def routed(self, features: Tensor, labels: Tensor, strength: float = 1.0) -> Weights:
        """The weights that a support set chooses."""
        return self.model.weights_for(self.routing(features, labels), strength)

    @torch.no_grad()
    def routing(self, features: Tensor, labels: Tensor) -> Routing:
        """The mixture that a support set chooses, from its frozen features."""
        return self.model.mixture.route(features, Condition(support=SupportSet(features, labels)))


class Trainer:
    """Meta-tunes rows on the training domains and keeps what comes of it in a folder."""

    def __init__(
        self, backbone: Callable[[], nn.Module], domains: Mapping[str, Pictures], budget: Budget, folder: Path
    ):
        self.backbone, self.budget, self.folder = backbone, budget, folder
        self.domains = [tensor_domain(name, given.images, given.labels, reader=read) for name, given in domains.items()]

    def episodes(self, seed: int) -> VariableEpisodes:
        """The episodes of one seed: of any of the domains, the same for every row."""
        return VariableEpisodes(
            domains=self.domains, ways=WAYS, queries=QUERIES, per_class=PER_CLASS, support=SUPPORT, hierarchy=False,
            seed=1000 + seed,
        )  # fmt: skip

    def model(self, row: Row, seed: int) -> FewShotModel:
        """The row before meta-tuning, its masks given where they are."""
        config = row.config(self.budget, seed)
        settings = {name: getattr(config, name) for name in row.settings} | {"experts": config.experts}
        model = mw.compose("smat", backbone=self.backbone(), features="cls", seed=seed, **settings)
        assert isinstance(model, FewShotModel)
        if row.masks_of == "fisher":
            set_masks(model.deltas, largest(self.fisher(model, seed)))
        elif row.masks_of:
            donor = self.trained(row_named(row.masks_of), seed).model
            set_masks(model.deltas, largest({k.replace("/", "."): d.detach() for k, d in donor.deltas.delta.items()}))
        return model

    def trained(self, row: Row, seed: int) -> Trained:
        """The row meta-tuned, from the folder where it was before."""
        file = self.folder / f"{row.name.replace(' ', '-').replace('>', '').replace(',', '')}-{seed}.pt"
        if file.exists():
            kept = torch.load(file, weights_only=True)
            model = self.model(replace(row, masks_of=""), seed)
            load(model, kept["state"])
            return Trained(model.eval(), kept["snapshots"], kept["cpu_seconds"], kept["loss"])
        model = self.model(row, seed)
        config = row.config(self.budget, seed)
        made = meta_tuned(model, config, self.episodes(seed), row.budget(self.budget), seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        kept = {"state": state_of(model), "snapshots": made.snapshots}
        torch.save(kept | {"cpu_seconds": made.cpu_seconds, "loss": made.loss}, file)
        return made

    def fisher(self, model: FewShotModel, seed: int) -> dict[str, Tensor]:
        """The mean squared gradient of the pretrained weights over the first training episodes (FISH mask)."""
        source = self.episodes(seed)
        names = dict(model.backbone.named_parameters())
        theta = {name: names[name].detach().clone().requires_grad_() for name in model.deltas.names}
        total = {name: torch.zeros_like(tensor) for name, tensor in theta.items()}
        for index in range(self.budget.fisher_tasks):
            episode = source.episode(index)
            assert episode.query_labels is not None
            support, query = model.features(episode.support, theta), model.features(episode.query, theta)
            prototypes = class_means(support, episode.labels, episode.ways)
            loss = cross_entropy(cosine_scores(query, prototypes), episode.query_labels)
            gradients = torch.autograd.grad(loss, list(theta.values()), allow_unused=True, materialize_grads=True)
            for name, gradient in zip(theta, gradients, strict=True):
                total[name] += gradient.square()
        return total


def meta_tuned(model: FewShotModel, config: SmatConfig, source: EpisodeSource, budget: Budget, seed: int) -> Trained:
    """The model through the product's stage *meta-tune*."""
    (stage, *_) = stages(config)
    stage = replace(stage, groups=groups(config, model))
    assert isinstance(stage.objective, EpisodeLoss)
    watched = _Watched(stage.objective, budget.snapshots)
    batches, settings = episode_batches(source, length=budget.tasks), TrainConfig(accumulate=budget.accumulate)
    started = time.process_time()
    found = fit(model, replace(stage, objective=watched), batches, config=settings, seed=seed)
    tail = found.losses[-max(1, len(found.losses) // 5) :]
    return Trained(model.eval(), watched.kept, time.process_time() - started, sum(tail) / len(tail))


class _Watched:
    """An objective that keeps the state of the model when so many tasks have been seen."""

    def __init__(self, objective: EpisodeLoss, at: Sequence[int]) -> None:
        self.objective, self.at, self.seen = objective, set(at), 0
        self.at_once = objective.at_once
        self.kept: dict[int, State] = {}

    def __call__(self, model: Any, batch: Any) -> Tensor:
        return self.together(model, [batch])

    def together(self, model: Any, batches: Sequence[Any]) -> Tensor:
        if self.seen in self.at:
            self.kept[self.seen] = state_of(model)
        self.seen += len(batches)
        return self.objective.together(model, batches)


def read(items: Sequence[Tensor], generator: Generator | None = None) -> Tensor:
    """Images of a domain as the ViT reads them."""
    return pixels(torch.stack(list(items)))


def largest(values: Mapping[str, Tensor], share: float = 0.1) -> dict[str, Tensor]:
    """Where the largest magnitudes are, so many of all."""
    flat = torch.cat([tensor.abs().flatten() for tensor in values.values()])
    least = flat.kthvalue(max(1, round((1 - share) * len(flat)))).values
    return {name: tensor.abs() > least for name, tensor in values.items()}


def state_of(model: FewShotModel) -> State:
    """Router and experts."""
    return {name: tensor.detach().clone() for name, tensor in model.mixture.state_dict().items() if _own(name)}


def load(model: FewShotModel, state: Mapping[str, Tensor]) -> None:
    """Put a state in place."""
    missing, strange = model.mixture.load_state_dict(dict(state), strict=False)
    assert not strange and not any(_own(name) for name in missing)


def row_named(name: str) -> Row:
    return next(row for row in (*MAIN, *MORE, *ROUTED, *LONG) if row.name == name)


def between(base: Weights, tuned: Weights, share: float) -> Weights:
    """WiSE: base + share (tuned - base)."""
    return {name: base[name] + share * (tensor - base[name]) for name, tensor in tuned.items()}


def _own(name: str) -> bool:
    return name.startswith(("router.", "experts."))
