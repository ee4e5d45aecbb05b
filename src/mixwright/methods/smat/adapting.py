"""What meta-tuning leaves beside the pool, the tasks that it saw, and stage *adapt*: new tasks, by name."""

import time
from dataclasses import dataclass
from typing import cast

from torch import device, nn

from mixwright.composition.measured_domains import MeasuredDomain, measured_tensors
from mixwright.composition.model import ComposedModel
from mixwright.composition.routes import remember_tasks
from mixwright.data.batches import Batches
from mixwright.data.episode_batches import support_episode
from mixwright.data.episodes import Episode
from mixwright.evaluation.episodes import direct, pretrained, score
from mixwright.methods.smat.classifier import FewShotClassifier
from mixwright.methods.smat.model import FewShotModel
from mixwright.training.fitted import Fitted
from mixwright.training.job import Job

MOST_TASKS = 256


def remember_training(model: FewShotModel, job: Job) -> None:
    """Keep where the first tasks of the training lie, by which a new one is told to be novel; fewer than two: none.

    And what the pool is worth on held-out domains, beside the pretrained model, on the episodes that were looked at in
    training.
    """
    if job.validation is not None:
        model.whole.update(measured_tensors(measure(model, job.validation)))
    if job.data is None:
        return
    drawn = min(MOST_TASKS, model.composition.config["steps"] * job.recipe.train.accumulate)
    if drawn >= 2:
        remember_tasks(model, (job.data.batch(index) for index in range(drawn)))  # type: ignore[arg-type]


def measure(model: FewShotModel, held_out: Batches) -> list[MeasuredDomain]:
    """Each domain of `held_out`: the pretrained model and the pool, directly, on the same episodes."""
    found: list[MeasuredDomain] = []
    source = _There(held_out, next(model.backbone.parameters()).device)
    first = 0
    for name, count in held_out.tasks.items():
        numbers = range(first, first + count)
        before, after = score(pretrained(model), source, numbers), score(direct(model), source, numbers)
        _, half = after.minus(before)
        found.append(MeasuredDomain(name, before.mean, after.mean, half if count > 1 else 0.0, count))
        first += count
    return found


@dataclass(frozen=True)
class _There:
    """Batches that are episodes, by their number, on a device."""

    batches: Batches
    device: device

    def episode(self, index: int) -> Episode:
        return cast(Episode, self.batches.batch(index)).to(self.device)


def adapt(model: FewShotModel, job: Job, quiet: bool) -> Fitted:
    """Each new task's mixture and classifier, kept under its name; no gradient step."""
    del quiet
    began = time.monotonic()
    said: list[str] = []
    for name, domain in job.supports.items():
        try:
            episode = support_episode(domain)
            with FewShotClassifier(model).fit(episode) as classifier:
                classifier.remember(name)
                error = classifier.support_error
            route = model.route(episode)
        except ValueError as error:
            raise ValueError(f"recipe.data.new_tasks.{name}: {error}") from error
        judged = "no class has a second item to judge by" if error != error else f"held-out error {error:.1%}"
        novelty = "" if route.novelty is None else f"; {route.novelty}"
        shares = ", ".join(f"{e} {float(w):.0%}" for e, w in zip(route.names, route.weights, strict=True))
        said.append(f"{name}: {len(episode.labels)} items of {episode.ways} classes; {judged}; {shares}{novelty}")
    return Fitted(steps=0, loss=None, best=None, seconds=time.monotonic() - began, said="\n".join(said))


def pool_before(backbone: nn.Module, seed: int, before: ComposedModel | None) -> ComposedModel:
    """The pool that is adapted. Raises ValueError where there is none: a fresh one would change nothing."""
    del backbone, seed
    if before is None:
        raise ValueError("recipe.composition: missing; stage adapt takes a trained pool, and none was trained here.")
    return before
