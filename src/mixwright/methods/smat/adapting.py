"""What meta-tuning leaves beside the pool, the tasks that it saw, and stage *adapt*: new tasks, by name."""

import time

from torch import nn

from mixwright.composition.model import ComposedModel
from mixwright.composition.routes import remember_tasks
from mixwright.data.episode_batches import support_episode
from mixwright.methods.smat.classifier import FewShotClassifier
from mixwright.methods.smat.model import FewShotModel
from mixwright.training.fitted import Fitted
from mixwright.training.job import Job

MOST_TASKS = 256


def remember_training(model: FewShotModel, job: Job) -> None:
    """Keep where the first tasks of the training lie, by which a new one is told to be novel; fewer than two: none."""
    if job.data is None:
        return
    drawn = min(MOST_TASKS, model.composition.config["steps"] * job.recipe.train.accumulate)
    if drawn >= 2:
        remember_tasks(model, (job.data.batch(index) for index in range(drawn)))  # type: ignore[arg-type]


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
