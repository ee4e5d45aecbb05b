"""The systems of the pretrained comparison: components, their logit ensemble, and hybrids through their stages."""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import mixwright as mw
from benchmarks.hybrid_pretrained_pair import NAMES, load_pair, tokenizer_of
from benchmarks.hybrid_pretrained_search import Search, search
from benchmarks.hybrid_pretrained_texts import GENERAL, Batches, Texts
from benchmarks.hybrid_pretrained_training import (
    Spent,
    document_losses,
    forward_flops,
    size_of,
    train,
)
from mixwright.data.collate import Batch
from mixwright.methods.manticore.fitting import fit_projectors


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Optimiser steps of the stages."""

    align: int = 50
    search: int = 40
    tune: int = 80
    retune: int = 30

    @property
    def target(self) -> int:
        """What a hybrid reads of its target: search and tune."""
        return self.search + self.tune


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A hybrid before training."""

    blocks: int = 1
    projectors: str = "identity"
    rows: str = "own"
    weights: str = "static"

    def __str__(self) -> str:
        extra = "" if self.weights == "static" else f" {self.weights}"
        return f"K={self.blocks} {self.projectors} {self.rows}{extra}"


class LogitEnsemble(nn.Module):
    """logits = sum_m w_m logits_m with learned w: what costs the same and has no projector."""

    def __init__(self, components: Sequence[nn.Module], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.components = nn.ModuleList(components)
        given = torch.ones(len(components)) if weights is None else torch.tensor(weights)
        self.weights = nn.Parameter(given.clamp_min(1e-9).log().log_softmax(-1))

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        shares = self.weights.softmax(-1)
        every = [component(input_ids=input_ids, **kwargs).logits for component in self.components]
        return SimpleNamespace(logits=sum(share * logits for share, logits in zip(shares, every, strict=True)))


class Workshop:
    """The pair, the texts, and everything that is made of them."""

    def __init__(self, pair: Path, data: Path, budget: Budget, rates: Mapping[str, float] | None = None) -> None:
        self.pair = load_pair(pair)
        self.texts = Texts(data, tokenizer_of(pair))
        self.budget = budget
        self.rates: dict[str, float] = dict(rates or {})
        self.aligned: dict[tuple[Shape, int], tuple[dict[str, Tensor], dict[str, float]]] = {}

    def for_an_epoch(self) -> "Workshop":
        """The same with enough steps of tuning for about one pass over Shakespeare, four times as many."""
        longer = copy.copy(self)
        longer.budget = replace(self.budget, tune=4 * self.budget.tune)
        return longer

    def component(self, name: str) -> nn.Module:
        """A copy, to be trained."""
        return copy.deepcopy(self.pair[name])

    def windows(self, corpus: str, part: str, seed: int) -> Batches:
        """Random windows; the same for every system."""
        return Batches(self.texts.parts[corpus][part].stream, seed + 1)

    def hybrid(self, shape: Shape, seed: int, given: Sequence[nn.Module] | None = None) -> Any:
        """As composed: pretrained components, or those given, new projectors, uniform weights."""
        return mw.compose(
            "manticore",
            backbones=given or [self.component(name) for name in NAMES],
            names=NAMES,
            num_blocks=shape.blocks,
            projectors=shape.projectors,
            rows=shape.rows,
            weights=shape.weights,
            seed=seed,
        )

    def align(self, shape: Shape, seed: int) -> tuple[Any, dict[str, float]]:
        """A hybrid whose projectors are aligned on general text with frozen components, and what that cost.

        Those of least squares are fitted to the first windows of that text, and aligned like the others then.
        """
        model = self.hybrid(shape, seed)
        if (shape, seed) not in self.aligned:
            spent = Spent()
            windows = self.windows(GENERAL, "align", seed)
            if shape.projectors == "least_squares":
                started = time.process_time()
                fit_projectors(model, _Read(windows))
                spent.seconds += time.process_time() - started
            before = self.general_loss(model)
            if projectors_of(model):
                train(model, projectors_of(model), windows, self.budget.align, self.rates["align"], spent)
            found = {"before": before, "after": self.general_loss(model), "flops": spent.flops, "cpu": spent.seconds}
            kept = {n: p.detach().clone() for n, p in model.named_parameters() if _is_projector(n)}
            self.aligned[shape, seed] = (kept, found)
        kept, found = self.aligned[shape, seed]
        model.load_state_dict(kept, strict=False)
        return model, found

    def searched(self, shape: Shape, seed: int, corpus: str, kind: Search, spent: Spent) -> dict[str, Any]:
        """The mixture weights that a search finds on a target, from the aligned hybrid."""
        model, _ = self.align(shape, seed)
        path = search(
            model,
            [*components_of(model), *projectors_of(model)],
            kind,
            self.windows(corpus, "train", seed),
            self.windows(corpus, "search", seed),
            self.budget.search,
            self.rates["hybrid"],
            spent,
        )
        slots = {"embedding": model.embedding_weights, "head": model.head_weights, "blocks": model.mixture_weights}
        return {**{slot: weights.tolist() for slot, weights in slots.items()}, "path": path}

    def tuned(
        self, shape: Shape, seed: int, corpus: str, weights: Mapping[str, Any] | None, steps: int, spent: Spent
    ) -> Any:
        """Rewound to the pretrained components and aligned projectors, tuned with these mixture weights fixed."""
        model, _ = self.align(shape, seed)
        if weights is not None:
            set_weights(model, weights)
        chosen = [*components_of(model), *projectors_of(model)]
        windows = self.windows(corpus, "train", seed)
        train(model, chosen, windows, steps, self.rates["hybrid"], spent, first=self.budget.search)
        return model

    def measured(self, model: nn.Module, corpus: str, spent: Spent, **more: Any) -> dict[str, Any]:
        """Everything that is written down about a system on a target."""
        found = self.texts.parts[corpus]
        return {
            "test": document_losses(model, found["test"].windows()).tolist(),
            "search_part": float(document_losses(model, found["search"].windows(3)).mean()),
            "general": self.general_loss(model),
            "steps": spent.steps,
            "train_flops": spent.flops,
            "cpu_seconds": round(spent.seconds, 1),
            "parameters": size_of(model),
            "flops_per_token": forward_flops(model),
            **more,
        }

    def general_loss(self, model: nn.Module) -> float:
        """On articles that neither pretraining nor alignment has seen."""
        return float(document_losses(model, self.texts.parts[GENERAL]["test"].windows(6)).mean())

    def with_rates(self, rates: Mapping[str, float]) -> None:
        """Take these learning rates, by kind of system."""
        self.rates.update(rates)


class _Read:
    """Windows of each step as a batch that is only read."""

    def __init__(self, windows: Batches) -> None:
        self.windows = windows

    def batch(self, index: int) -> Batch:
        ids = self.windows(index)[:, :-1]
        return Batch("causal", {"input_ids": ids}, ids, ids.numel())


def set_weights(model: Any, weights: Mapping[str, Any]) -> None:
    """Block rows, and those of embedding and head where they are named."""
    model.mixture_weights = weights["blocks"]
    if "embedding" in weights:
        model.embedding_weights, model.head_weights = weights["embedding"], weights["head"]


def components_of(model: Any) -> list[nn.Parameter]:
    """Parameters of the components."""
    return list(model.backbone.components.parameters())


def projectors_of(model: Any) -> list[nn.Parameter]:
    """Parameters of the projectors."""
    return [p for name, p in model.named_parameters() if _is_projector(name)]


def slopes_of(model: Any) -> list[nn.Parameter]:
    """What input-dependent mixture weights have beside their static part."""
    return list({id(p): p for name, p in model.named_parameters() if name.endswith("router.slope")}.values())


def _is_projector(name: str) -> bool:
    return ".experts.enter." in name or ".experts.leave." in name


def equal_flops(spent: float, one_step: float) -> int:
    """The steps that cost as much, rounded."""
    return max(1, round(spent / one_step))
