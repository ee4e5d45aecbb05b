"""Optimisers whose step costs what the retrieved rows cost, not what the table does.

    optimizer = mw.LazyAdamW(model, lr=1e-3, table_lr=4e-3)      # tables by rows, every other parameter by AdamW
    loss.backward()
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.zero_grad()

Both set `gradient="auto"` on the tables that they find, so that backward passes leave compact gradients. Rows that a
dense optimiser would go on moving without a gradient are caught up when they are read: by a table's own forward pass,
when it is saved or copied, and by `flush()`. Read `table.rows` yourself only after `flush()`. Frozen rows never change;
call `flush()` before you freeze or release some.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mixwright.experts.table import NeuronTable
from mixwright.ops.huge_pages import zeros
from mixwright.ops.missed_steps import Moments, missed_steps
from mixwright.ops.row_kernels import adagrad_rows, adamw_rows, decay_rows, replay_rows
from mixwright.ops.row_update import AdamWStep
from mixwright.ops.stochastic_rounding import noise_key
from mixwright.training.row_optimizer import STATE, AbstractRowOptimizer, Given

_UPDATE, _REPLAY = 0, 1


class LazyAdamW(AbstractRowOptimizer):
    """AdamW that touches only rows with a gradient, and equals the dense one (Loshchilov & Hutter 2019).

    Steps in which a row had no gradient are made up for before it is read next: moments decayed, the parameter moved by
    the momentum left and by weight decay, each with the bias correction and the learning rate of its own step, in
    closed form (`ops/missed_steps.py`). `betas` and `eps` of tables must stay as they are; learning rates and weight
    decay may follow any schedule.
    """

    def __init__(
        self,
        params: Given,
        lr: float = 1e-3,
        *,
        table_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        tables: Iterable[NeuronTable] = (),
        seed: int = 0,
    ) -> None:
        if not 0 <= betas[0] ** 2 < betas[1] < 1:
            raise ValueError(f"betas={betas}: expected 0 <= beta1, beta1**2 < beta2 < 1; AdamW diverges otherwise.")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        own = {} if table_lr is None else {"lr": table_lr}
        super().__init__(params, defaults, own, tables, seed)

    def _fresh(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        dtype, group = STATE[parameter.dtype], self._group_of(parameter)
        return {
            "exp_avg": zeros(parameter.shape, dtype, parameter.device),
            "exp_avg_sq": zeros(parameter.shape, dtype, parameter.device),
            "rates": torch.zeros(2, dtype=torch.float64),
            "constants": torch.tensor([*group["betas"], group["eps"]], dtype=torch.float64),
        }

    def _update(
        self, parameter: nn.Parameter, ids: Tensor | None, values: Tensor, lr: float, group: dict[str, Any]
    ) -> None:
        state = self.state[parameter]
        (beta1, beta2), eps, decay = group["betas"], group["eps"], group["weight_decay"]
        rule = AdamWStep(int(state["step"]), lr, beta1, beta2, eps, decay)
        rows, first, second = (_flat(t) for t in (parameter.data, state["exp_avg"], state["exp_avg_sq"]))
        adamw_rows(rows, first, second, ids, values, rule, noise_key(group["seed"], rule.step, _UPDATE))

    def _replay(self, parameter: nn.Parameter, ids: Tensor, starts: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        step, moments = int(state["step"]), Moments(*state["constants"].tolist())
        distinct, which = _distinct(starts, step)
        dtype = state["exp_avg"].dtype
        replay = missed_steps(distinct, step, state["rates"], state["decays"], moments, dtype).to(ids.device)
        rows, first, second = (_flat(t) for t in (parameter.data, state["exp_avg"], state["exp_avg_sq"]))
        replay_rows(rows, first, second, ids, which, replay, moments.eps, noise_key(group["seed"], step, _REPLAY))


class RowwiseAdagrad(AbstractRowOptimizer):
    """s_r <- s_r + mean(g_r^2), p_r <- (1 - lr wd) p_r - lr g_r / (sqrt(s_r) + eps) for each row r of an expert.

    Duchi et al. 2011 with one accumulator for a row, as is usual for embedding tables: 4 bytes of state for each row
    instead of 8 for each number. Weight decay is decoupled, and acts in every step on every row: what a row missed is
    made up for before it is read. Every other parameter has AdamW with `lr` and `weight_decay`.
    """

    def __init__(
        self,
        params: Given,
        lr: float = 1e-3,
        *,
        table_lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        tables: Iterable[NeuronTable] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay}, {"lr": table_lr, "eps": eps}, tables, seed)

    def _fresh(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return {"sum": zeros(parameter.shape[:2], STATE[parameter.dtype], parameter.device)}

    def _update(
        self, parameter: nn.Parameter, ids: Tensor | None, values: Tensor, lr: float, group: dict[str, Any]
    ) -> None:
        state = self.state[parameter]
        keep = 1 - lr * group["weight_decay"]
        key = noise_key(group["seed"], int(state["step"]), _UPDATE)
        adagrad_rows(_flat(parameter.data), state["sum"], ids, values, lr, group["eps"], keep, key)

    def _replay(self, parameter: nn.Parameter, ids: Tensor, starts: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        step, decays = int(state["step"]), state["decays"]
        if decays[step]:
            factors = (decays[step] - decays[starts.cpu()]).exp().to(state["sum"].dtype).to(ids.device)
            decay_rows(_flat(parameter.data), ids, factors, noise_key(group["seed"], step, _REPLAY))


def _distinct(starts: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Starting points, each once, and which of them each row has: by marks, which is faster than sorting where many."""
    if len(starts) < step:
        return starts.unique(return_inverse=True)
    there = torch.zeros(step + 1, dtype=torch.int64, device=starts.device).index_fill_(0, starts, 1)
    return there.nonzero().squeeze(1), (there.cumsum(0) - 1)[starts]


def _flat(tensor: Tensor) -> Tensor:
    return tensor.view(len(tensor), -1)
