"""The only training loop: stages in, trained weights out, interrupted at any moment without harm."""

import json
import math
import time
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from mixwright.data.batches import Batches
from mixwright.files import exclusive_lock
from mixwright.recipe import TrainConfig
from mixwright.training.checkpoint import Checkpoints, Snapshot
from mixwright.training.fitted import Fitted
from mixwright.training.forecast import STEPS
from mixwright.training.interrupt import Interruption, interruption
from mixwright.training.processes import make_accelerator
from mixwright.training.progress import Report, reporting
from mixwright.training.randomness import own_randomness
from mixwright.training.stage import ParamGroup, Stage
from mixwright.training.update import HeldOut, Updater
from mixwright.training.watching import Watcher


def fit(
    model: nn.Module,
    stage: Stage,
    data: Batches,
    *,
    config: TrainConfig | None = None,
    seed: int = 0,
    folder: Path | None = None,
    validation: Batches | None = None,
    identity: Mapping[str, str] | None = None,
    resume: bool = False,
    force: bool = False,
    quiet: bool = True,
) -> Fitted:
    """Train what `stage` selects of `model`, in place; every other tensor stays as it is, to the bit.

    The gradient of a step is that of the summed loss of all its forward passes, on every process, divided by the number
    of targets in them. With `folder`, checkpoints and `log.jsonl` lie there, and `resume` continues to the same bits on
    the same machine with the same number of threads; `identity` holds what the weights depend on (data, backbone,
    settings) and a run that differs in it is refused unless `force`. Under torchrun each process calls this.

    Raises:
        ValueError: the loss or gradient is not finite, a step has no target, a glob selects nothing, `folder` holds a
            run and neither `resume` nor `force` is given, or it holds a different run. What was reached is on disk.
        KeyboardInterrupt: after a checkpoint of the last whole step, when a folder is given.
    """
    config = config or TrainConfig()
    accelerator = make_accelerator(config.tracker, None if folder is None else str(folder))
    with ExitStack() as stack:
        stack.enter_context(own_randomness())
        main = accelerator.is_main_process
        checkpoints = None
        if folder is not None:
            checkpoints = Checkpoints(
                folder / "checkpoints", {**(identity or {}), **_identity(stage, config, seed, accelerator)}
            )
            if main:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(exclusive_lock(folder / ".lock", timeout=2.0))
        snapshot = _begin(checkpoints, resume=resume, force=force, main=main)
        accelerator.wait_for_everyone()
        updater = stack.enter_context(_prepared(model, stage, data, validation, config, seed, accelerator))
        if snapshot is not None:
            updater.restore(snapshot)
        log = _Log(folder if main else None, 0 if snapshot is None else snapshot.step)
        done = 0 if snapshot is None else snapshot.step
        report = stack.enter_context(reporting(stage.name, stage.steps, done, quiet=quiet or not main))
        stop = stack.enter_context(interruption(accelerator.num_processes == 1))
        if config.tracker is not None:
            accelerator.init_trackers(stage.name)
        watcher = Watcher(stage) if main else None
        run = _Run(updater, config, checkpoints if main else None, log, report, stop, accelerator, watcher)
        return run.from_step(done)


@dataclass(slots=True)
class _Run:
    updater: Updater
    config: TrainConfig
    checkpoints: Checkpoints | None
    log: "_Log"
    report: Report
    stop: Interruption
    accelerator: Accelerator
    watcher: Watcher | None

    def from_step(self, done: int) -> Fitted:
        stage, updater, began = self.updater.stage, self.updater, time.monotonic()
        losses: list[float] = []
        predicted: float | None = None
        self.report.step(done, None)
        if done == 0:
            updater.consider(0)
        for step in range(done, stage.steps):
            try:
                losses.append(updater.step(step))
            except ValueError:
                self._save(step)
                raise
            self._after(step + 1, losses[-1])
            if step + 1 == done + STEPS:
                predicted = (time.monotonic() - began) / STEPS * (stage.steps - done)
        if self.config.tracker is not None:
            self.accelerator.end_training()
        best = updater.keep_best()
        return Fitted(
            steps=stage.steps,
            loss=losses[-1] if losses else None,
            best=None if best is None else (best.step, best.loss),
            seconds=time.monotonic() - began,
            losses=tuple(losses),
            held_out={} if best is None else best.by_task,
            predicted=predicted,
        )

    def _after(self, done: int, loss: float) -> None:
        steps = self.updater.stage.steps
        held_out = self.updater.consider(done)
        if held_out is not None or done % self.config.log_every == 0 or done == steps:
            self._note(done, loss, held_out)
        self.report.step(done, loss)
        interrupted = self.stop.requested
        if done % self.config.checkpoint_every == 0 or done == steps or interrupted:
            self._save(done)
        if interrupted and done < steps:
            kept = "continue with resume" if self.checkpoints is not None else "nothing is kept without a folder"
            raise KeyboardInterrupt(f"stage {self.updater.stage.name} stopped after step {done} of {steps}; {kept}.")

    def _note(self, done: int, loss: float, held_out: HeldOut | None) -> None:
        numbers = {"loss": loss}
        if held_out is not None:
            numbers["held_out_loss"] = held_out.loss
            numbers.update({f"held_out_loss.{task}": value for task, value in held_out.by_task.items()})
        if self.watcher is not None:
            numbers.update(self.watcher.look(self.updater.model, done))
        numbers = {name: value for name, value in numbers.items() if math.isfinite(value)}  # the log is JSON
        self.log.add(done, numbers)
        if self.config.tracker is not None:
            self.accelerator.log(numbers, step=done)

    def _save(self, done: int) -> None:
        if self.checkpoints is not None:
            self.checkpoints.save(self.updater.snapshot(done))


@contextmanager
def _prepared(
    model: nn.Module,
    stage: Stage,
    data: Batches,
    validation: Batches | None,
    config: TrainConfig,
    seed: int,
    accelerator: Accelerator,
) -> Generator[Updater]:
    """An updater over a model in training mode; afterwards modes and `requires_grad` are what they were."""
    if getattr(model, "hf_device_map", None) is None:
        model.to(accelerator.device)
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    updater: Updater | None = None
    try:
        updater = Updater(model, stage, data, validation, config, seed, accelerator)
        yield updater
    finally:
        if updater is not None:
            updater.close()
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)
            parameter.grad = None


def _begin(checkpoints: Checkpoints | None, *, resume: bool, force: bool, main: bool) -> Snapshot | None:
    if checkpoints is None:
        if resume:
            raise ValueError("resume needs the folder of the run that is to be continued.")
        return None
    if resume:
        return checkpoints.latest(force=force)
    there = checkpoints.steps()
    if there and not force:
        raise ValueError(
            f"{checkpoints.folder.parent} holds a run that reached {there[0].name}; continue it with resume, take "
            "another output_dir, or start over with force."
        )
    if there and main:
        checkpoints.clear()
    return None


def _identity(stage: Stage, config: TrainConfig, seed: int, accelerator: Accelerator) -> dict[str, str]:
    """What the resulting weights depend on, beside data, backbone and method: each by the name a person knows."""
    import torch

    from mixwright import __version__

    groups = [[list(g.select), g.lr, g.maximize, g.split, *_own_rule(g)] for g in stage.groups]
    return {
        "stage": stage.name,
        "steps": str(stage.steps),
        "groups": json.dumps(groups),
        "optimizer": json.dumps([stage.optimizer, stage.clip, stage.weight_decay, stage.choose_every]),
        "schedule": json.dumps([stage.warmup, stage.cooldown, *([] if stage.fall == "linear" else [stage.fall])]),
        "seed": str(seed),
        "batch_size": str(config.batch_size),
        "accumulate": str(config.accumulate),
        "precision": config.precision,
        "processes": str(accelerator.num_processes),
        "code": f"mixwright {__version__}, torch {torch.__version__}",
    }


def _own_rule(group: ParamGroup) -> list[str | float | None]:
    rule: list[str | float | None] = []
    if (group.optimizer, group.lr_end) != ("adamw", 1.0):
        rule += [group.optimizer, group.lr_end]
    if (group.delay, group.clip, group.weight_decay) != (0.0, True, None):
        rule += [group.delay, group.clip, group.weight_decay]
    if group.momentum:
        rule += ["momentum", group.momentum]
    return rule if group.turn is None else [*rule, *group.turn]


class _Log:
    """`log.jsonl`: one line per logged step. Lines after the step a run resumes from are taken back."""

    def __init__(self, folder: Path | None, done: int) -> None:
        self.path = None if folder is None else folder / "log.jsonl"
        if self.path is not None:
            lines = (
                self.path.read_text(encoding="utf-8").splitlines(keepends=True) if done and self.path.exists() else []
            )
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= done]
            self.path.write_text("".join(kept), encoding="utf-8")

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **numbers}) + "\n")
