"""Programming a hybrid: its mixture weights without a search on the task, from what components say and can do.

A user writes the weights into the config: `mw.compose("manticore", backbones=[...], num_blocks=K, mixture_weights=
program_from_mad(["gpt_neox", "mamba2"], num_blocks=K).mixture_weights)`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor, nn

from mixwright.backbones.eval_mode import eval_mode
from mixwright.backbones.family import family_of
from mixwright.backbones.hf import build_backbone, default_settings, read_settings
from mixwright.backbones.shrink import shrunk
from mixwright.data.collate import IGNORED
from mixwright.data.mad import SMALL, mad_batches
from mixwright.data.mad_tasks import MadTask
from mixwright.methods.manticore.config import ManticoreConfig
from mixwright.methods.manticore.model import HybridModel, compose
from mixwright.methods.manticore.searching import (
    ENUMERATED,
    begin_search,
    end_search,
    search_groups,
    search_objective,
)
from mixwright.training.fit import fit
from mixwright.training.stage import Stage

Component = nn.Module | Mapping[str, Any] | str | Path
"""A model, the fields of a config with its `model_type`, the name of a family, or a model's folder or hub id."""
Rows = tuple[tuple[float, ...], ...]
"""(blocks, models): mixture weights of every block, as `ManticoreConfig.mixture_weights` takes them."""
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
_TESTED = 256


@dataclass(frozen=True, kw_only=True)
class Program:
    """What programming from MAD found: the mean over tasks and seeds, and for each task what came of it.

    `accuracy` and `loss`: of the small hybrids, on test examples; they tell which tasks were learned at all.
    """

    mixture_weights: Rows
    by_task: Mapping[str, Rows]
    accuracy: Mapping[str, float]
    loss: Mapping[str, float]


def context_limit(component: Component) -> int | None:
    """Positions that a component has; None where nothing in its config says that there is an end."""
    settings = settings_of(component)
    limits = [settings.get(name) for name in _POSITIONS]
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def program_from_metadata(components: Sequence[Component], *, num_blocks: int, context: int) -> Rows:
    """Even weights over the components that read `context` tokens; 0 for those whose config says they can't.

    Raises ValueError when none can.
    """
    able = _able(components, context)
    share = 1.0 / sum(able)
    return (tuple(share if can else 0.0 for can in able),) * num_blocks


def program_from_mad(
    components: Sequence[Component],
    *,
    num_blocks: int,
    tasks: Mapping[str, MadTask] = SMALL,
    steps: int = 300,
    batch_size: int = 32,
    seeds: Sequence[int] = (0,),
    context: int | None = None,
    shrink: bool = True,
    config: ManticoreConfig | None = None,
) -> Program:
    """The mean of the mixture weights that small hybrids, trained from scratch on each task of MAD, end with.

    Roberts et al. 2024, programming from MAD. Of each component its config alone is used, cut down to tiny, or as it is
    without `shrink`; its vocabulary is the task's. `config` holds the search and its rates; by default the paper's
    DARTS, whose embedding and head have block 0's weights, at .1, the rest at 2e-3. Of components that can't
    read `context` tokens the weight is 0 and nothing is trained.

    Raises ValueError for a task, a search or components that this can't be done with.
    """
    settings = replace(
        config or ManticoreConfig(rows="block", learning_rate=2e-3, weights_learning_rate=0.1),
        num_blocks=num_blocks, names=None, mixture_weights=None, weights="static",
    )  # fmt: skip
    _check(settings, tasks, steps, seeds)
    able = [True] * len(components) if context is None else _able(components, context)
    members = [component for component, can in zip(components, able) if can]
    if len(members) == 1:
        return Program(mixture_weights=(tuple(map(float, able)),) * num_blocks, by_task={}, accuracy={}, loss={})
    small = [_small(member, shrink) for member in members]
    found = {
        name: [_searched(small, task, replace(settings, seed=seed), steps, batch_size) for seed in seeds]
        for name, task in tasks.items()
    }
    rows = {name: _spread(torch.stack([one.weights for one in each]).mean(0), able) for name, each in found.items()}
    return Program(
        mixture_weights=_rows(torch.tensor(list(rows.values()), dtype=torch.float64).mean(0)),
        by_task=rows,
        accuracy={name: fmean(one.accuracy for one in each) for name, each in found.items()},
        loss={name: fmean(one.loss for one in each) for name, each in found.items()},
    )


def settings_of(component: Component) -> dict[str, Any]:
    """All fields of a component's config, `model_type` among them; those that a mapping leaves out by default."""
    if isinstance(component, nn.Module):
        return _text_settings(cast(Any, component).config)
    if isinstance(component, Mapping):
        if "model_type" not in component:
            raise ValueError(f"a component's config has no model_type; it has {', '.join(component) or 'nothing'}.")
        return {**default_settings(str(component["model_type"])), **component}
    family = family_of(component)
    settings = default_settings(family) if family == str(component) else read_settings(component)
    return {**settings, "model_type": family}


@dataclass(frozen=True)
class _Found:
    weights: Tensor
    accuracy: float
    loss: float


def _searched(
    small: Sequence[Mapping[str, Any]], task: MadTask, config: ManticoreConfig, steps: int, batch_size: int
) -> _Found:
    """One small hybrid on one task: components, projectors and mixture weights learn together."""
    models = [_built(settings, task, config.seed) for settings in small]
    model = compose(config, models)
    begin_search(model, config)
    data = mad_batches(task, batch_size=batch_size, seed=config.seed)
    stage = Stage(
        name=f"MAD {task.name}",
        groups=search_groups(model, config),
        steps=steps,
        objective=search_objective(config, model, task.length),
        cooldown=0.25,
    )
    fit(model, stage, data, seed=config.seed)
    end_search(model)
    accuracy, loss = _tested(model, task, config.seed)
    return _Found(model.mixture_weights.double(), accuracy, loss)


@torch.no_grad()
def _tested(model: HybridModel, task: MadTask, seed: int) -> tuple[float, float]:
    examples = task.sample(_TESTED, seed, "test")
    with eval_mode(model):
        logits = model(input_ids=examples.tokens).logits
    scored = examples.targets != IGNORED
    wanted = examples.targets[scored]
    right = (logits[scored].argmax(-1) == wanted).float().mean()
    return float(right), float(torch.nn.functional.cross_entropy(logits[scored], wanted))


def _small(component: Component, shrink: bool) -> dict[str, Any]:
    settings = settings_of(component)
    return shrunk(settings, settings["model_type"]) if shrink else settings


def _built(settings: Mapping[str, Any], task: MadTask, seed: int) -> nn.Module:
    """No id is special to a task, and no component may drop out: noise in one of them alone would tell against it."""
    given = {name: value for name, value in settings.items() if name != "model_type"}
    quiet = {name: 0.0 for name, value in given.items() if "drop" in name and isinstance(value, float)}
    long = {name: max(int(given[name]), task.length) for name in _POSITIONS if isinstance(given.get(name), int)}
    special = dict.fromkeys((name for name in given if name.endswith("_token_id")), None)
    known = {**given, **quiet, **long, **special, "vocab_size": task.vocab_size}
    return build_backbone(str(settings["model_type"]), known, kind="causal", seed=seed)


def _able(components: Sequence[Component], context: int) -> list[bool]:
    limits = [context_limit(component) for component in components]
    able = [limit is None or limit >= context for limit in limits]
    if not any(able):
        raise ValueError(f"no component reads {context} tokens; their configs say {', '.join(map(str, limits))}.")
    return able


def _check(config: ManticoreConfig, tasks: Mapping[str, MadTask], steps: int, seeds: Sequence[int]) -> None:
    if config.search in ENUMERATED:
        raise ValueError(
            f"config.search={config.search}: it ends with no mean to take; expected a search by gradients."
        )
    if config.search == "bilevel":
        raise ValueError(
            "config.search=bilevel: MAD has one stream of examples here; expected darts, gaea or the like."
        )
    if not tasks or not seeds or steps < 1:
        raise ValueError(f"{len(tasks)} tasks, {len(seeds)} seeds, {steps} steps; expected at least one of each.")


def _text_settings(config: Any) -> dict[str, Any]:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return {**text.to_dict(), "model_type": text.model_type}


def _spread(weights: Tensor, able: Sequence[bool]) -> Rows:
    """Weights of the components that act, among zeros for the others."""
    whole = torch.zeros(weights.shape[0], len(able), dtype=torch.float64)
    whole[:, torch.tensor(able)] = weights
    return _rows(whole)


def _rows(weights: Tensor) -> Rows:
    return tuple(tuple(row) for row in weights.tolist())
