"""One optimiser step, and the weights, optimisers and best weights that change with it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]  the only name of the family

from mixwright.data.batches import Batches
from mixwright.data.collate import Batch
from mixwright.recipe import TrainConfig
from mixwright.training.across import share_reads, sum_gradients
from mixwright.training.checkpoint import Snapshot
from mixwright.training.gradients import clip_gradients, no_rows, settle, touched_rows
from mixwright.training.moving import (
    following,
    moving_buffers,
    pool_over,
    pooling,
    refuse_sharded,
    settling,
    tell_progress,
)
from mixwright.training.optimizers import load_optimizer_state, make_optimizers, optimizer_state, set_rate
from mixwright.training.randomness import seed_pass
from mixwright.training.row_optimizer import AbstractRowOptimizer
from mixwright.training.stage import JointObjective, ParamGroup, Stage, select_parameters

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Losses per target on held-out data after `step` steps; `loss` is their mean over tasks: each counts alike."""

    step: int
    loss: float
    by_task: Mapping[str, float]


class Updater:
    """theta <- optimiser(theta, clip(grad of sum of losses / number of targets)), over the groups of one stage."""

    def __init__(
        self,
        model: nn.Module,
        stage: Stage,
        data: Batches,
        validation: Batches | None,
        config: TrainConfig,
        seed: int,
        accelerator: Accelerator,
    ) -> None:
        self.model, self.stage, self.config, self.seed, self.accelerator = model, stage, config, seed, accelerator
        self.validation = validation
        self.chosen = select_parameters(model, stage.groups)
        self.parameters = {name: parameter for group in self.chosen for name, parameter in group.items()}
        self.sources = self._sources(data)
        refuse_sharded(model, self.parameters.values(), stage.name)
        self._refuse_sleep()
        self._set_trainable(0)
        self.optimizers = make_optimizers(model, stage, self.chosen, seed)
        self.lazy = [optimizer for optimizer in self.optimizers if isinstance(optimizer, AbstractRowOptimizer)]
        self.tables = {p: table for optimizer in self.lazy for p, table in optimizer.tables.items()}
        if accelerator.num_processes > 1:
            for optimizer in self.lazy:
                optimizer.reads = {p: [] for p in optimizer.tables}
        self._following = following(model)
        self._pooling = pooling(model)
        self._settling = settling(model)
        pool_over(dict.fromkeys(self._pooling, config.accumulate))
        self.autocast = _DTYPES.get(config.precision) or _low_precision(model)
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=self.autocast is torch.float16)
        self.best: HeldOut | None = None
        self.best_weights: dict[str, Tensor] = {}

    def step(self, step: int) -> float:
        """Update number `step` (from 0); returns the loss per target of the training batches.

        Raises ValueError for a loss or a gradient that is not finite, with the weights as they were before.
        """
        set_rate(self.optimizers, self.stage.rate(step), step / self.stage.steps)
        tell_progress(self._following, step / self.stage.steps)
        self._enter_training()
        awake = self._members(lambda group: self._is_awake(group, step))
        for parameter in self.parameters.values():
            dense = parameter in awake and parameter not in self.tables
            if dense and parameter.grad is not None and not parameter.grad.is_sparse:
                parameter.grad.zero_()  # memory that is there: pages that are new to a process cost more than zeros
            else:
                parameter.grad = torch.zeros_like(parameter) if dense else None
        splits = {group.split for group in self.stage.groups if self._is_awake(group, step)}
        losses = {s: self._accumulate(s, batches, step) for s, batches in self.sources.items() if s in splits}
        for split, loss in losses.items():
            if not math.isfinite(loss):
                raise ValueError(self._not_finite(f"the {split} loss is {loss}", step))
        for parameter, table in ((p, table) for p, table in self.tables.items() if p in awake):
            parameter.grad = no_rows(parameter) if parameter.grad is None else parameter.grad
            settle(parameter, table.frozen)
        self._sum_over_processes()
        self._apply(step)
        return losses.get("train", next(iter(losses.values())))

    def consider(self, done: int) -> HeldOut | None:
        """After `done` steps, remember the weights if none before did better on held-out data; a tie is won."""
        tell_progress(self._following, done / self.stage.steps)
        every = self.stage.choose_every
        if every is None or self.validation is None or not (done % every == 0 or done == self.stage.steps):
            return None
        by_task = self.held_out_losses(self.validation)
        found = HeldOut(done, sum(by_task.values()) / len(by_task), by_task if self.validation.tasks else {})
        if self.best is None or math.isnan(self.best.loss) or found.loss <= self.best.loss:
            self.best = found
            self._flush()
            self.best_weights = {name: tensor.detach().clone() for name, tensor in self._changing().items()}
        return found

    def keep_best(self) -> HeldOut | None:
        """Put the best weights back, if any were chosen; the step they are from and their held-out losses."""
        self._flush()
        self._write(self.best_weights)
        return self.best

    def close(self) -> None:
        """Leave every row of the tables as the optimiser means it, and the model to others."""
        for optimizer in self.lazy:
            optimizer.close()
        pool_over(self._pooling)

    @torch.no_grad()
    def held_out_losses(self, batches: Batches) -> dict[str, float]:
        """Mean loss per target over every example once, in eval mode, for each task."""
        self.model.eval()
        names = list(batches.tasks) or [""]
        totals = torch.zeros((2, len(names)), dtype=torch.float64, device=self.accelerator.device)
        for part in batches.in_order(self.accelerator.process_index, self.accelerator.num_processes):
            batch, task = batches.take(part), names.index(batches.task_of(part))
            totals[0, task] += self._loss([batch]).double()
            totals[1, task] += batch.weight
        if self.accelerator.num_processes > 1:
            totals = cast(Tensor, self.accelerator.reduce(totals, "sum"))
            share_reads(self.lazy)
        return dict(zip(names, (totals[0] / totals[1].clamp_min(1.0)).tolist(), strict=True))

    def snapshot(self, done: int) -> Snapshot:
        """Where the run stands after `done` steps."""
        tensors, values = optimizer_state(self.optimizers)
        files: dict[str, Mapping[str, Tensor]] = {
            "weights.safetensors": self._changing(),
            "optimizer.safetensors": tensors,
        }
        if self.best is not None:
            files["best.safetensors"] = self.best_weights
        return Snapshot(
            step=done,
            tensors=files,
            values={
                "optimizer": values,
                "scaler": self.scaler.state_dict(),
                "best": None if self.best is None else [self.best.step, self.best.loss, dict(self.best.by_task)],
            },
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Stand where `snapshot` was taken."""
        self._write(snapshot.tensors["weights.safetensors"])
        load_optimizer_state(self.optimizers, snapshot.tensors["optimizer.safetensors"], snapshot.values["optimizer"])
        if snapshot.values["scaler"]:
            self.scaler.load_state_dict(snapshot.values["scaler"])
        if snapshot.values["best"] is not None:
            self.best = HeldOut(*snapshot.values["best"])
            device = self.accelerator.device
            self.best_weights = {n: t.to(device) for n, t in snapshot.tensors["best.safetensors"].items()}

    @torch.no_grad()
    def _write(self, weights: Mapping[str, Tensor]) -> None:
        """Through the parameters, not their `data`: whoever keeps what was built from them is told by their version."""
        held = self._changing()
        for name, tensor in weights.items():
            held[name].copy_(tensor)

    def _changing(self) -> dict[str, Tensor]:
        return {**self.parameters, **moving_buffers(self.model, self.parameters.values())}

    def _flush(self) -> None:
        for optimizer in self.lazy:
            optimizer.flush()

    def _sources(self, data: Batches) -> dict[str, Batches]:
        splits = {group.split for group in self.stage.groups}
        if "val" in splits and self.validation is None:
            raise ValueError(f"stage {self.stage.name} has a group that learns on held-out data; give data.validation.")
        both: dict[str, Batches | None] = {"train": data, "val": self.validation}
        return {split: batches for split, batches in both.items() if split in splits and batches is not None}

    def _refuse_sleep(self) -> None:
        if self.stage.groups and not any(self._is_awake(group, 0) for group in self.stage.groups):
            raise ValueError(
                f"stage {self.stage.name}: every group has a delay; one must learn from the first step on."
            )

    def _is_awake(self, group: ParamGroup, step: int) -> bool:
        return group.is_awake(step, self.stage.steps)

    def _members(self, chosen: Callable[[ParamGroup], bool]) -> set[nn.Parameter]:
        groups = zip(self.stage.groups, self.chosen, strict=True)
        return {parameter for group, members in groups if chosen(group) for parameter in members.values()}

    def _set_trainable(self, step: int, split: str | None = None) -> None:
        """Gradients for the parameters of the groups that learn in this step, of one split or of both; for nothing
        else in the model."""
        learning = self._members(lambda group: split in (None, group.split) and self._is_awake(group, step))
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter in learning)

    def _enter_training(self) -> None:
        """Training mode, so that the backbone's own dropout acts; running statistics of a frozen backbone stay."""
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()

    def _accumulate(self, split: str, batches: Batches, step: int) -> float:
        world, each = self.accelerator.num_processes, self.config.accumulate
        indices = [(step * each + m) * world + self.accelerator.process_index for m in range(each)]
        passes = [batches.batch(index) for index in indices]
        weight = self._reduced(torch.tensor(float(sum(batch.weight for batch in passes))))
        if weight == 0:
            rows = ", ".join([where for batch in passes for where in batch.where][:4]) or f"batch {indices[0]}"
            raise ValueError(
                f"step {step}: no token of its {split} examples counts ({rows}); are their completions cut off?"
            )
        if len(self.sources) > 1 or any(group.delay or group.turn for group in self.stage.groups):
            self._set_trainable(step, split)
        total = torch.zeros((), device=self.accelerator.device)
        objective = self.stage.objective
        size = objective.at_once if isinstance(objective, JointObjective) else 1
        for at in range(0, len(passes), size):
            seed_pass(self.seed, indices[at])
            loss = self._loss(passes[at : at + size])
            self.scaler.scale(loss / weight).backward()
            total += loss.detach()
        return self._reduced(total) / weight

    def _loss(self, batches: Sequence[Batch]) -> Tensor:
        """The summed loss of batches, of one alone but where the objective takes several."""
        device, objective = self.accelerator.device, self.stage.objective
        given = [batch.to(device) for batch in batches]
        with torch.autocast(device.type, dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            if isinstance(objective, JointObjective) and len(given) > 1:
                return objective.together(self.model, given).float()
            (batch,) = given
            return objective(self.model, batch).float()

    def _reduced(self, value: Tensor) -> float:
        """The sum over processes."""
        if self.accelerator.num_processes == 1:
            return value.item()
        return self.accelerator.reduce(value.to(self.accelerator.device), "sum").item()  # pyright: ignore

    def _sum_over_processes(self) -> None:
        if self.accelerator.num_processes > 1:
            share_reads(self.lazy)
            sum_gradients(self.parameters.values(), self.tables, self.accelerator)

    def _apply(self, step: int) -> None:
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = self._clipped()
        if self.autocast is not torch.float16 and not math.isfinite(norm):
            raise ValueError(self._not_finite(f"the gradient's norm is {norm}", step))
        for parameter in self._climbing():
            if parameter.grad is not None:
                touched_rows(parameter.grad)[1].neg_()
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        for module in self._settling:
            cast(Any, module).after_step()

    def _clipped(self) -> float:
        """The norm of the gradients that are clipped together; not finite where that of the others is not."""
        limit = math.inf if self.stage.clip is None else self.stage.clip
        apart = self._members(lambda group: group.clip is not True)
        norm = clip_gradients([p for p in self.parameters.values() if p not in apart], limit).item()
        for group, members in zip(self.stage.groups, self.chosen, strict=True):
            if group.clip is not True:
                own = math.inf if group.clip is False else group.clip
                norm += 0.0 * clip_gradients(members.values(), own).item()
        return norm

    def _climbing(self) -> Sequence[nn.Parameter]:
        climbing = self._members(lambda group: group.maximize)
        return [parameter for parameter in self.parameters.values() if parameter in climbing]

    def _not_finite(self, what: str, step: int) -> str:
        return (
            f"stage {self.stage.name}, step {step}: {what}. The weights of step {step} are kept; lower the "
            "learning rate, check the data, or train with precision bf16 or no."
        )


def _low_precision(model: nn.Module) -> torch.dtype | None:
    """The dtype to compute in when the frozen weights are of low precision and the recipe asks for none."""
    dtypes = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
    return next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in dtypes), None)
