"""Routing by task: one row of weights for each task, given or learned.

A task router reads `condition.task_ids`, one for each row of the batch or one for all of them, or where nobody knows
the task `condition.task_weights`: how much each row of the batch resembles each task.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixwright.routers.base import AbstractRouter
from mixwright.routers.remembered import version
from mixwright.routing import Condition, Routing

EPSILON = 1e-12


class AbstractTaskRouter(AbstractRouter):
    """w = table[task], `(tasks, [positions,] experts)`: positions are orders or heads that choose for themselves."""

    @property
    @abstractmethod
    def num_tasks(self) -> int:
        """Rows of the table."""

    @abstractmethod
    def table(self) -> Float[Tensor, "tasks *positions experts"]:
        """The weights of every task, as they are in evaluation."""

    def rows(self, task_ids: Tensor) -> Float[Tensor, "batch *positions experts"]:
        """The weights of these tasks; in training they may be noisy."""
        return self.table().index_select(0, task_ids)

    def forward(self, x: Float[Tensor, "*batch d_in"], condition: Condition) -> Routing:
        """One choice for each row of the batch, or a single one for all: `(batch or 1, 1, ..., [positions,] experts)`.

        Raises ValueError without task ids, and for one that is no row of the table.
        """
        if condition.task_weights is not None:
            weights = self._resembling(condition.task_weights)
        elif condition.task_ids is not None:
            weights = self.rows(self._known(condition.task_ids))
        else:
            raise ValueError(
                "a task router needs condition.task_ids, one id for each row of the batch or one for all; a model "
                "composed for named tasks takes them in `with model.with_task(name):`."
            )
        alike = [1] * (x.dim() - 2)
        return Routing(weights.reshape(weights.shape[0], *alike, *weights.shape[1:]), self.num_experts)

    def _resembling(self, task_weights: Tensor) -> Tensor:
        """sum_t a_t table[t] + (1 - sum_t a_t) / experts: what resembles no task is uniform."""
        table = self.table()
        if task_weights.shape[-1] != self.num_tasks:
            raise ValueError(
                f"condition.task_weights has {task_weights.shape[-1]} columns for a router of {self.num_tasks} tasks."
            )
        shares = task_weights.to(table.dtype)
        rest = (1 - shares.sum(-1)).reshape(-1, *[1] * (table.dim() - 1))
        return torch.tensordot(shares, table, 1) + rest / self.num_experts

    def _known(self, task_ids: Tensor) -> Tensor:
        if task_ids.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere reading them would wait
            strange = [task for task in task_ids.tolist() if not 0 <= task < self.num_tasks]
            if strange:
                raise ValueError(
                    f"condition.task_ids holds {strange[0]}, but this router knows {self.num_tasks} tasks, "
                    f"0 to {self.num_tasks - 1}."
                )
        return task_ids


class TaskRouter(AbstractTaskRouter):
    """w = table[task], given: one-hot rows make an oracle, or a retrieval's answer."""

    def __init__(self, table: Float[Tensor, "tasks *positions experts"]) -> None:
        super().__init__()
        self.num_experts = table.shape[-1]
        self.register_buffer("weights", table.float())
        self.weights: Tensor

    @property
    def num_tasks(self) -> int:
        """Rows of the table."""
        return self.weights.shape[0]

    def table(self) -> Float[Tensor, "tasks *positions experts"]:
        """As it was given."""
        return self.weights


class TaskLogits(AbstractTaskRouter):
    """w = sigmoid(z_t) / (sum_s sigmoid(z_ts) + 1e-12), Ponti et al. 2022, section 3: a soft subset, not a softmax.

    `logits` z, learned: `(tasks, [positions,] experts)`. In training only, and only when asked: `noise` draws a relaxed
    Bernoulli variable sigmoid((z + log u - log(1 - u)) / temperature) for each row of the batch, `straight_through`
    rounds to 0 or 1 with the gradient of what was rounded. Logits stay float32 in a model that is cast to less. One
    router may serve many sites. The table of an eval pass, and the routing of one tensor of task ids, are remembered
    for as long as nothing changed.
    """

    def __init__(
        self,
        logits: Float[Tensor, "tasks *positions experts"],
        *,
        noise: bool = False,
        temperature: float = 1.0,
        straight_through: bool = False,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}; expected a number over 0.")
        self.num_experts = logits.shape[-1]
        self.logits = nn.Parameter(logits)
        self.noise, self.temperature, self.straight_through = noise, temperature, straight_through
        self._forget()

    @property
    def num_tasks(self) -> int:
        """Rows of the table."""
        return self.logits.shape[0]

    def table(self) -> Float[Tensor, "tasks *positions experts"]:
        """The weights of every task without noise; remembered where no gradient is recorded."""
        if torch.is_grad_enabled() and self.logits.requires_grad or torch.compiler.is_compiling():
            return self._normalised(torch.sigmoid(self._wide()))
        key = (version(self.logits), self.logits.data_ptr())
        if self._table is None or self._table[0] != key or key[0] is None:
            with torch.inference_mode(False), torch.no_grad():
                self._table = (key, self._normalised(torch.sigmoid(self._wide())))
        return self._table[1]

    def rows(self, task_ids: Tensor) -> Float[Tensor, "batch *positions experts"]:
        """The weights of these tasks: noisy in training if so asked."""
        if not (torch.is_grad_enabled() and self.logits.requires_grad) and not (self.training and self.noise):
            return super().rows(task_ids)
        scores = self._wide().index_select(0, task_ids)
        if self.training and self.noise:
            draw = torch.rand_like(scores).clamp_(EPSILON, 1 - torch.finfo(scores.dtype).eps)
            scores = (scores + torch.log(draw) - torch.log1p(-draw)) / self.temperature
        return self._normalised(torch.sigmoid(scores))

    def forward(self, x: Float[Tensor, "*batch d_in"], condition: Condition) -> Routing:
        """As every task router; the same object again where nothing changed since the last call."""
        ids, fixed = condition.task_ids, not (torch.is_grad_enabled() and self.logits.requires_grad)
        fixed = fixed and ids is not None and condition.task_weights is None and not (self.training and self.noise)
        if not fixed or torch.compiler.is_compiling():
            return super().forward(x, condition)
        assert ids is not None
        key = (version(ids), x.dim(), version(self.logits), self.logits.data_ptr())
        seen = self._routing
        if seen is not None and seen[0] is ids and seen[1] == key and None not in key:
            return seen[2]
        with torch.inference_mode(False), torch.no_grad():  # what is made in inference mode counts no writes
            routing = super().forward(x, condition)
        self._routing = (ids, key, routing)
        return routing

    def _normalised(self, chosen: Tensor) -> Tensor:
        if self.straight_through:
            chosen = (chosen.round() - chosen).detach() + chosen
        return chosen / (chosen.sum(-1, keepdim=True) + EPSILON)

    def _wide(self) -> Tensor:
        return self.logits.to(torch.promote_types(self.logits.dtype, torch.float32))

    def _forget(self) -> None:
        self._table: tuple[Any, Tensor] | None = None
        self._routing: tuple[Tensor, Any, Routing] | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TaskLogits":
        """As nn.Module's, but a cast to less than float32 moves the logits without rounding them."""
        wide = self.logits.data
        super()._apply(fn, recurse)
        if self.logits.dtype.itemsize < min(4, wide.dtype.itemsize):
            self.logits.data = wide.to(self.logits.device)
        self._forget()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None, "_routing": None}
