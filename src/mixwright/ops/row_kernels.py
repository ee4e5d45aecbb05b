"""The rules of `ops/row_update.py` by their compiled twin where it fits: one pass over the rows that are touched.

It takes tables on the CPU in float32 or bfloat16 with float32 state, all contiguous. All else goes the plain way.
"""

import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor

from mixwright.ops import kernels, row_update
from mixwright.ops.missed_steps import TERMS, Replay
from mixwright.ops.row_update import AdamWStep


def lagging_rows(
    ids: Int[Tensor, " ids"], last: Int32[Tensor, " experts"], step: int, frozen: Bool[Tensor, " experts"] | None
) -> tuple[Int[Tensor, " rows"], Int[Tensor, " rows"]]:
    """Which of `ids` were last caught up before `step`, each once and none that is frozen, and the step of each.

    In `last` they are marked as caught up, frozen ones too: those stand still. Raises IndexError for a foreign id.
    """
    native = kernels.kernel() if _lie(ids, last) and (frozen is None or _lie(frozen)) else None
    if native is None:
        return _lagging_rows(ids, last, step, frozen)
    found, starts = torch.empty_like(ids), torch.empty_like(ids)
    count = native.lagging_rows(
        ids.data_ptr(), last.data_ptr(), len(ids), len(last), step, _place(frozen), found.data_ptr(), starts.data_ptr()
    )
    if count < 0:
        raise IndexError(f"ids name a row outside of the {len(last)} that this table has.")
    return found[:count], starts[:count]


def _lagging_rows(ids: Tensor, last: Tensor, step: int, frozen: Tensor | None) -> tuple[Tensor, Tensor]:
    late = ids[last[ids] < step].unique()
    starts = last[late].long()
    last[late] = step
    if frozen is not None:
        late, starts = late[~frozen[late]], starts[~frozen[late]]
    return late, starts


def adamw_rows(
    rows: Float[Tensor, "experts row"],
    first: Float[Tensor, "experts row"],
    second: Float[Tensor, "experts row"],
    ids: Int[Tensor, " ids"] | None,
    gradient: Float[Tensor, "_ row"],
    rule: AdamWStep,
    key: int,
) -> None:
    """One step of AdamW for rows that have a gradient."""
    native = _native(rows, first, second)
    if native is None:
        row_update.adamw_rows(rows, first, second, ids, gradient, rule, key)
        return
    gradient = gradient.float().contiguous()
    native.adamw_rows(
        *(rows.data_ptr(), first.data_ptr(), second.data_ptr(), _place(ids), gradient.data_ptr()),
        *(len(gradient), rows.shape[1], rows.dtype == torch.bfloat16),
        *(1 - rule.lr * rule.weight_decay, 1 - rule.beta1, rule.beta2, 1 - rule.beta2),
        *(rule.lr / (1 - rule.beta1**rule.step), (1 - rule.beta2**rule.step) ** 0.5, rule.eps, key),
    )


def replay_rows(
    rows: Float[Tensor, "experts row"],
    first: Float[Tensor, "experts row"],
    second: Float[Tensor, "experts row"],
    ids: Int[Tensor, " ids"],
    which: Int[Tensor, " ids"],
    replay: Replay,
    eps: float,
    key: int,
) -> None:
    """The missed steps of AdamW."""
    native = _native(rows, first, second) if replay.sums.shape[2] == TERMS[torch.float32] else None
    if native is None:
        row_update.replay_rows(rows, first, second, ids, which, replay, eps, key)
        return
    steps = (replay.kept, replay.first, replay.second, replay.middles, replay.sums, replay.near)
    parts = [part.contiguous() for part in steps]
    native.replay_rows(
        *(tensor.data_ptr() for tensor in (rows, first, second, ids, which)),
        *(len(ids), rows.shape[1], rows.dtype == torch.bfloat16),
        *(part.data_ptr() for part in parts),
        *(replay.sums.shape[1], eps, key),
    )


def adagrad_rows(
    rows: Float[Tensor, "experts row"],
    sums: Float[Tensor, "experts parts"],
    ids: Int[Tensor, " ids"] | None,
    gradient: Float[Tensor, "_ row"],
    lr: float,
    eps: float,
    keep: float,
    key: int,
) -> None:
    """One step of row-wise Adagrad."""
    native = _native(rows, sums)
    if native is None:
        row_update.adagrad_rows(rows, sums, ids, gradient, lr, eps, keep, key)
        return
    gradient, parts = gradient.float().contiguous(), sums.shape[1]
    native.adagrad_rows(
        *(rows.data_ptr(), sums.data_ptr(), _place(ids), gradient.data_ptr()),
        *(len(gradient), parts, rows.shape[1] // parts, rows.dtype == torch.bfloat16),
        *(lr, eps, keep, key),
    )


def decay_rows(
    rows: Float[Tensor, "experts row"], ids: Int[Tensor, " ids"], factors: Float[Tensor, " ids"], key: int
) -> None:
    """Each row times its factor."""
    native = _native(rows)
    if native is None:
        row_update.decay_rows(rows, ids, factors, key)
        return
    factors = factors.float().contiguous()
    native.decay_rows(
        *(rows.data_ptr(), ids.data_ptr(), factors.data_ptr()),
        *(len(ids), rows.shape[1], rows.dtype == torch.bfloat16, key),
    )


def _native(rows: Tensor, *state: Tensor) -> kernels.Kernels | None:
    fits = rows.dtype in (torch.float32, torch.bfloat16) and all(s.dtype == torch.float32 for s in state)
    return kernels.kernel() if fits and _lie(rows, *state) else None


def _lie(*tensors: Tensor) -> bool:
    return all(tensor.is_cpu and tensor.is_contiguous() for tensor in tensors)


def _place(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
