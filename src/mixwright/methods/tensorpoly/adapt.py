"""A new task from few examples: everything, its row of logits (z), or the experts under uniform routing (mu) learns.

What learns and where the row starts may be chosen by k-fold validation over the shots, so that no test label is
touched (Su et al. 2024 and Ponti et al. 2022 fix both, and choose checkpoints on the data that they report).
"""

import math
import time
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mixwright.backbones.eval_mode import eval_mode
from mixwright.composition.model import ComposedModel
from mixwright.data.batches import Batches
from mixwright.data.collate import Batch
from mixwright.methods.tensorpoly import task_rows
from mixwright.methods.tensorpoly.adaptation import Adaptation, Candidate, Start, What
from mixwright.methods.tensorpoly.config import TensorPolyConfig
from mixwright.methods.tensorpoly.shots import Examples, Shots, deal, read_shots
from mixwright.methods.tensorpoly.task_rows import Rows, task_names, task_routers
from mixwright.recipe import TrainConfig
from mixwright.routers.constant import ConstantRouter
from mixwright.routing import Condition
from mixwright.training.fit import Fitted, fit
from mixwright.training.objectives import supervised
from mixwright.training.stage import ParamGroup, Stage

WHAT: tuple[What, ...] = ("router", "experts", "all")
"""Fewest trained numbers first: the earlier wins a tie."""
STARTS: tuple[Start, ...] = ("mean", "source", "fresh")


def adapt(
    model: ComposedModel,
    task: str,
    examples: Examples,
    *,
    what: What | Literal["auto"] | None = None,
    start: Literal["fresh", "mean", "source", "auto"] | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    router_learning_rate: float | None = None,
    folds: int | None = None,
    seed: int = 0,
    tokenizer: Any = None,
    labels: Sequence[str] | None = None,
    batch_size: int = 8,
    max_length: int = 512,
    quiet: bool = True,
) -> Adaptation:
    """Teach `model` one task more, in place, from few examples; settings left out are those of the model's config.

    `what` learns: `router`, the task's own row of logits, under which no other task changes by a bit; `experts`, the
    experts under uniform routing; `all`, both. Experts are shared, so under `experts` and `all` **the earlier tasks
    change with them**: to keep those too, save the model first, or export tasks with `model.export_lora`. The row
    starts `fresh` near zero, at the `mean` of the sources, or at the `source` task whose routing fits the shots best.
    `auto`, for either, compares by k-fold validation over the shots, stratified by label, every candidate from the
    same weights; then all shots train the best. Regularisers of the config are left to stage *multitask*.

    Raises ValueError for a task that the model has, for examples it cannot learn from or too few for the folds, and for
    training that diverges. On any exception, Ctrl-C included, the model is what it was before.
    """
    began = time.monotonic()
    if not isinstance(task, str) or not task.strip():  # pyright: ignore[reportUnnecessaryIsInstance]  (a caller's)
        raise ValueError(f"task {task!r}: expected a name for the new task.")
    if task in task_names(model):
        raise ValueError(f"task {task!r} is one of the model's already ({', '.join(task_names(model)[:10])}).")
    if steps is not None and steps < 1:
        raise ValueError(f"steps={steps}: expected 1 or more.")
    config = TensorPolyConfig(**model.composition.config)
    plan = _Plan(
        steps=steps if steps is not None else config.transfer_steps,
        learning_rate=learning_rate if learning_rate is not None else config.transfer_learning_rate,
        router_learning_rate=router_learning_rate if router_learning_rate is not None else config.router_learning_rate,
        config=config,
        seed=seed,
    )
    candidates = _candidates(model, what or config.transfer, start, config)
    shots = read_shots(
        examples,
        model,
        name=task,
        tokenizer=tokenizer,
        labels=labels,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
    )
    with _undone_on_failure(model) as before:
        if len(candidates) > 1:
            parts = _parts(shots, folds if folds is not None else config.folds, task, seed)
            candidates = _validated(model, shots, parts, candidates, plan, before)
        best = min(candidates, key=lambda one: one.mean)
        rows, source = _first_rows(model, best.start, shots, range(len(shots)), seed)
        everything = shots.everything()
        with _trained(model, best, rows, everything, plan, quiet=quiet) as (rows, fitted, trained):
            loss = _loss(model, everything)
        task_rows.append(model, task, rows)
    return Adaptation(
        task=task,
        what=best.what,
        start=best.start,
        source=None if source is None else task_names(model)[source],
        candidates=candidates if len(candidates) > 1 else (),
        shots=len(shots),
        steps=fitted.steps,
        loss=loss,
        seconds=time.monotonic() - began,
        trained=trained,
    )


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """How every candidate is trained."""

    steps: int
    learning_rate: float
    router_learning_rate: float
    config: TensorPolyConfig
    seed: int


def _candidates(model: ComposedModel, what: str, start: str | None, config: TensorPolyConfig) -> tuple[Candidate, ...]:
    """What is open to choice. Without learned rows the experts are all that there is to train."""
    for name, value, known in (("what", what, (*WHAT, "auto")), ("start", start, (*STARTS, "auto", None))):
        if value not in known:
            raise ValueError(f"{name}={value!r}; expected one of {', '.join(str(v) for v in known if v is not None)}.")
    if not task_routers(model):
        if what == "router" or start not in (None, "auto"):
            raise ValueError(
                f"{config.experts} has no router, so that there is no row to train or to start; adapt with "
                "what='experts', or compose a kind whose tasks choose."
            )
        return (Candidate(what="experts", start="uniform"),)
    if what == "experts" and start not in (None, "auto"):
        raise ValueError(f"start={start!r}: what='experts' trains under uniform routing; leave start out.")
    asked = start or config.start
    starts: list[Start] = [one for one in STARTS if asked in (one, "auto")]
    found: list[Candidate] = []
    for one in WHAT:
        own: Sequence[Start] = ("uniform",) if one == "experts" else starts
        found += [Candidate(what=one, start=first) for first in own if what in (one, "auto")]
    return tuple(found)


def _parts(shots: Shots, folds: int, task: str, seed: int) -> list[list[int]]:
    """The shots dealt into folds. Raises ValueError where they are too few."""
    counts = {label: shots.labels.count(label) for label in dict.fromkeys(shots.labels)}
    lonely = [label for label, count in counts.items() if count < 2]
    if folds < 2 or len(shots) < folds or (lonely and len(counts) > 1):
        came = f"{len(shots)} shots" + (f", of label {lonely[0]!r} only one" if lonely and len(counts) > 1 else "")
        raise ValueError(
            f"task {task!r}: {came}; choosing by {folds}-fold validation needs folds of 2 or more, as many shots as "
            "folds, and two of every label. Give more shots or fewer folds, or choose what= and start= (mean, source "
            "or fresh) yourself: then one shot is enough."
        )
    return deal(shots.labels, folds, seed)


def _validated(
    model: ComposedModel,
    shots: Shots,
    parts: Sequence[Sequence[int]],
    candidates: Sequence[Candidate],
    plan: _Plan,
    before: "_Before",
) -> tuple[Candidate, ...]:
    """Every candidate with its loss on each part after training on the others. One that diverges loses, infinitely."""
    found: list[Candidate] = []
    failure: ValueError | None = None
    for one in candidates:
        losses: list[float] = []
        for part in parts:
            others = [number for other in parts if other is not part for number in other]
            rows, _ = _first_rows(model, one.start, shots, others, plan.seed)
            try:
                with _trained(model, one, rows, shots.take(others), plan, quiet=True):
                    loss = _loss(model, shots.take(part))
            except ValueError as error:
                loss, failure = math.inf, error
            finally:
                before.put_back_experts()
            losses.append(loss if math.isfinite(loss) else math.inf)
        found.append(replace(one, losses=tuple(losses)))
    if failure is not None and all(one.mean == math.inf for one in found):
        raise failure
    return tuple(found)


@contextmanager
def _trained(
    model: ComposedModel, one: Candidate, rows: Rows, data: Batches, plan: _Plan, *, quiet: bool
) -> Generator[tuple[Rows, Fitted, int]]:
    """Inside the block the model knows the new task alone, trained on `data`: its rows, and how training went."""
    with task_rows.alone(model, rows) as live, _routing(model, one):
        groups: list[ParamGroup] = []
        if one.what != "experts":
            groups.append(ParamGroup(select=_names(model, list(live.values())), lr=plan.router_learning_rate))
        if one.what != "router":
            groups.append(ParamGroup(select=_names(model, _experts(model)), lr=plan.learning_rate))
        stage = Stage(
            name="transfer",
            groups=tuple(groups),
            steps=plan.steps,
            objective=_of_the_task,
            warmup=plan.config.warmup,
            cooldown=plan.config.cooldown,
            clip=plan.config.clip,
        )
        how = TrainConfig(batch_size=data.batch_size)
        fitted = fit(model, stage, data, config=how, seed=plan.seed, quiet=quiet)
        chosen = {name for group in groups for name in group.select}
        yield live, fitted, sum(p.numel() for name, p in model.named_parameters() if name in chosen)


def _routing(model: ComposedModel, one: Candidate) -> AbstractContextManager[None]:
    """Uniform weights everywhere where only the experts train (MHR's mu), noise or not; else what the routers say."""
    if one.what != "experts" or not task_routers(model):
        return nullcontext()
    even = ConstantRouter(torch.full((len(model.experts),), 1.0 / len(model.experts))).to(_device(model))
    return model.replaced(routers=dict.fromkeys(model.mixtures, even))


def _of_the_task(model: Any, batch: Batch) -> Tensor:
    """The supervised loss of a batch under task 0, the only one that the model knows at the moment."""
    with model.under(Condition(task_ids=torch.zeros(1, dtype=torch.long, device=batch.targets.device))):
        return supervised(model, _nameless(batch))


def _nameless(batch: Batch) -> Batch:
    return replace(batch, task_ids=None, label_task_ids=None)


def _loss(model: ComposedModel, data: Batches, task: int = 0) -> float:
    """Loss per target of every example once, in eval mode, under a task."""
    device = _device(model)
    total, weight = 0.0, 0
    with eval_mode(model):
        for part in data.in_order():
            batch = data.take(part).to(device)
            with model.under(Condition(task_ids=torch.tensor([task], device=device))):
                total += float(supervised(model, _nameless(batch)))
            weight += batch.weight
    if weight == 0:
        where = ", ".join(data.take(data.in_order()[0]).where[:4]) or "the first batch"
        raise ValueError(f"no target of the examples counts ({where}); are their completions cut off?")
    return total / weight


def _first_rows(
    model: ComposedModel, start: Start, shots: Shots, numbers: Sequence[int], seed: int
) -> tuple[Rows, int | None]:
    """The rows from which a candidate starts, and for `source` the task that fits these shots best as it stands."""
    if start == "source":
        data = shots.take(numbers)
        losses = [_loss(model, data, task) for task in range(len(task_names(model)))]
        best = losses.index(min(losses))
        return task_rows.rows_of(model, best), best
    if start == "mean":
        return task_rows.mean_rows(model), None
    return (task_rows.fresh_rows(model, seed) if start == "fresh" else task_rows.even_rows(model)), None


def _experts(model: ComposedModel) -> list[nn.Parameter]:
    return [parameter for mixture in model.mixtures.values() for parameter in mixture.experts.parameters()]


def _names(model: ComposedModel, parameters: Sequence[nn.Parameter | Tensor]) -> tuple[str, ...]:
    """Their names: a glob could also select experts of the backbone's own."""
    wanted = {id(parameter) for parameter in parameters}
    return tuple(name for name, parameter in model.named_parameters() if id(parameter) in wanted)


def _device(model: ComposedModel) -> torch.device:
    return next(model.backbone.parameters()).device


class _Before:
    """What adapting may change, as it was."""

    def __init__(self, model: ComposedModel) -> None:
        self.model = model
        self.experts = {parameter: parameter.detach().clone() for parameter in _experts(model)}
        self.logits = {router: router.logits for router in task_routers(model)}
        self.composition = model.composition

    def put_back_experts(self) -> None:
        with torch.no_grad():
            for parameter, value in self.experts.items():
                parameter.copy_(value)

    def put_back(self) -> None:
        self.put_back_experts()
        for router, logits in self.logits.items():
            router.logits = logits
        self.model.composition = self.composition


@contextmanager
def _undone_on_failure(model: ComposedModel) -> Generator[_Before]:
    before = _Before(model)
    try:
        yield before
    except BaseException:
        before.put_back()
        raise
