"""What optimisers of tables have in common: which rows a step touches, which lag behind, and who must not see it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from mixwright.experts.table import NeuronTable
from mixwright.ops.huge_pages import zeros
from mixwright.ops.row_kernels import lagging_rows
from mixwright.training.gradients import clip_gradients, row_parameters, settle, tables_of, touched_rows

Given = nn.Module | Iterable[nn.Module | nn.Parameter | dict[str, Any]]
"""What an optimiser is made for: a module, or what torch takes, among which modules may stand."""

STATE = {torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.float64: torch.float64}
"""The type of the state of a table, by the type of its rows."""


class AbstractRowOptimizer(torch.optim.Optimizer, ABC):
    """Tables row by row, every other parameter exactly as `torch.optim.AdamW` does.

    `params`: a module, or what torch takes; modules may stand among it. Parameters of `tables`, and of the tables of
    modules, make groups of their own, with the learning rate `table_lr` where it is given. `seed`: of the stochastic
    rounding of bfloat16 tables. A table has one such optimiser at a time: the one before is closed.
    """

    def __init__(
        self,
        params: Given,
        defaults: dict[str, Any],
        table_defaults: dict[str, Any],
        tables: Iterable[NeuronTable],
        seed: int,
    ) -> None:
        items = [params] if isinstance(params, nn.Module) else list(params)
        found = [*tables, *(table for item in items if isinstance(item, nn.Module) for table in tables_of(item))]
        self.tables = row_parameters(found)
        self._dense = torch.optim.AdamW([torch.zeros(1)], **defaults)
        self._hooks: list[Callable[[], None]] = []
        self._closed = False
        self.reads: dict[nn.Parameter, list[Tensor]] | None = None
        """Rows that were caught up, where somebody notes them to tell other processes."""
        for parameter in self.tables:
            _check_table(parameter)
        groups = _split(items, self.tables, {**table_defaults, "seed": seed})
        super().__init__(groups, {**self._dense.defaults, "rows": False})
        stepped = {p for group in self.param_groups if group["rows"] for p in group["params"]}
        self.tables = {p: table for p, table in self.tables.items() if p in stepped}
        for table in dict.fromkeys(self.tables.values()):
            self._follow(table)

    @abstractmethod
    def _fresh(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """State of a parameter before its first step, beside `step`, `last` and `decays`."""

    @abstractmethod
    def _update(
        self, parameter: nn.Parameter, ids: Tensor | None, values: Tensor, lr: float, group: dict[str, Any]
    ) -> None:
        """Step number `state["step"]` for the rows that have a gradient."""

    @abstractmethod
    def _replay(self, parameter: nn.Parameter, ids: Tensor, starts: Tensor, group: dict[str, Any]) -> None:
        """The steps after `starts`, up to `state["step"]`, for rows that had no gradient in them."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step for every parameter that has a gradient, dense or compact."""
        if self._closed:
            raise ValueError("this optimiser was closed, or another took over its tables; make a new one.")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._dense.state = self.state
        self._dense.param_groups = [group for group in self.param_groups if not group["rows"]]
        self._dense.step()
        for group in self.param_groups:
            for parameter in group["params"] if group["rows"] else ():
                if parameter.grad is not None:
                    self._step_rows(parameter, group)
        return loss

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """torch's, over all parameters of this optimiser, with the gradients of frozen rows left out."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        for parameter in parameters:
            if parameter in self.tables:
                settle(parameter, self.tables[parameter].frozen)
        return clip_gradients(parameters, max_norm)

    @torch.no_grad()
    def flush(self) -> None:
        """Catch up every row of every table: one pass over whatever lags."""
        if not self._closed:
            for parameter in self.tables:
                self.catch_up(parameter, None)

    @torch.no_grad()
    def catch_up(self, parameter: nn.Parameter, ids: Tensor | None) -> Tensor | None:
        """Make up for what these rows of a table's parameter missed, None standing for all of them; which did lag."""
        state = self.state.get(parameter)
        if not state:
            return None
        _grow(state, len(parameter))
        step, last = int(state["step"]), state["last"]
        asked = (last < step).nonzero().squeeze(1) if ids is None else ids
        if not step or not len(asked):
            return None
        found, starts = lagging_rows(asked, last, step, self.tables[parameter].frozen)
        if len(found):
            self._replay(parameter, found, starts, self._group_of(parameter))
        return found

    def close(self) -> None:
        """Flush, and let go of the tables: their gradients are what they were before, and this optimiser is done."""
        if not self._closed:
            self.flush()
            self._closed = True
            for undo in self._hooks:
                undo()

    def state_dict(self, *, flush: bool = True) -> dict[str, Any]:
        """torch's. Without `flush` it fits the rows as they lie, lagging ones included, and changes none of them."""
        if flush:
            self.flush()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's, which would cast the state to the type of its parameter; a table's keeps its own."""
        super().load_state_dict(state_dict)
        given = (number for group in state_dict["param_groups"] for number in group["params"])
        own = (parameter for group in self.param_groups for parameter in group["params"])
        for number, parameter in zip(given, own, strict=True):
            if parameter in self.tables and number in state_dict["state"]:
                state = state_dict["state"][number]
                local = ("step", *_HISTORY)
                self.state[parameter] = {k: v if k in local else v.to(parameter.device) for k, v in state.items()}

    def _step_rows(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter] or self._begin(parameter)
        self._refuse_changed(state, group)
        lr, done = float(group["lr"]), int(state["step"])
        ids, values = touched_rows(cast(Tensor, parameter.grad))
        values = -values.flatten(1) if group["maximize"] else values.flatten(1)
        frozen = self.tables[parameter].frozen
        if frozen is not None:
            ids = torch.arange(len(parameter), device=parameter.device) if ids is None else ids
            free = ~frozen[ids]
            ids, values = ids[free], values[free]
        self.catch_up(parameter, ids)
        _remember(state, done + 1, lr, lr * group["weight_decay"])
        state["step"].fill_(done + 1)
        self._update(parameter, ids, values, lr, group)
        if ids is None:
            state["last"].fill_(done + 1)
        else:
            state["last"].index_fill_(0, ids, done + 1)

    def _refuse_changed(self, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Raises ValueError where a setting changed that must not; nothing has been done by then."""
        if "constants" in state and state["constants"].tolist() != [*group["betas"], group["eps"]]:
            raise ValueError(
                f"betas and eps of a table changed from {state['constants'].tolist()} to "
                f"{[*group['betas'], group['eps']]}; a lazy row is caught up with those that it began with. Keep them "
                "(cycle_momentum=False in OneCycleLR)."
            )

    def _begin(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        self.state[parameter] = {
            "step": torch.zeros((), dtype=torch.int64),
            "last": zeros((len(parameter),), torch.int32, parameter.device),
            "decays": torch.zeros(2, dtype=torch.float64),
            **self._fresh(parameter),
        }
        return self.state[parameter]

    def _group_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        return next(g for g in self.param_groups if g["rows"] and any(p is parameter for p in g["params"]))

    def _follow(self, table: NeuronTable) -> None:
        for hook in list(table.before_read):
            other = getattr(getattr(hook, "func", None), "__self__", None)
            if isinstance(other, AbstractRowOptimizer):
                other.close()
        read, before = partial(self._read, table), table.gradient
        table.before_read.append(read)
        table.gradient = "auto"

        def undo() -> None:
            table.before_read.remove(read)
            table.gradient = before

        self._hooks.append(undo)

    @torch.no_grad()
    def _read(self, table: NeuronTable, ids: Tensor) -> None:
        for parameter in (table.rows, table.bias):
            if parameter is not None:
                found = self.catch_up(parameter, ids.reshape(-1))
                if self.reads is not None and found is not None:
                    self.reads[parameter].append(found)


_HISTORY = ("rates", "decays", "constants")
"""State that belongs to the steps rather than to the rows, and stays on the CPU."""


def _grow(state: dict[str, Tensor], experts: int) -> None:
    """Room for experts that were appended to a table: they begin now."""
    more = experts - len(state["last"])
    if more:
        for name in state.keys() - {"step", *_HISTORY}:
            start = int(state["step"]) if name == "last" else 0
            old = state[name]
            state[name] = torch.cat([old, old.new_full((more, *old.shape[1:]), start)])


def _remember(state: dict[str, Tensor], step: int, lr: float, decay: float) -> None:
    """Note the learning rate of a step, and the logarithm of what weight decay left of a row up to it."""
    if decay >= 1:
        raise ValueError(f"lr * weight_decay = {decay} leaves nothing of a table's rows; it must stay below 1.")
    for name in ("rates", "decays"):
        if name in state and step >= len(state[name]):
            state[name] = torch.cat([state[name], torch.zeros_like(state[name])])
    if "rates" in state:
        state["rates"][step] = lr
    state["decays"][step] = state["decays"][step - 1] + math.log1p(-decay)


def _split(
    items: Iterable[Any], tables: dict[nn.Parameter, NeuronTable], table_defaults: dict[str, Any]
) -> list[dict[str, Any]]:
    """Groups of either kind, in the order given; a parameter that is named twice counts once."""
    loose = [item for item in items if not isinstance(item, dict)]
    parameters = [p for item in loose for p in (item.parameters() if isinstance(item, nn.Module) else [item])]
    given = [{"params": list(dict.fromkeys(parameters))}] if parameters else []
    groups: list[dict[str, Any]] = []
    for group in [*given, *(item for item in items if isinstance(item, dict))]:
        members = group["params"] if isinstance(group["params"], list) else list(_members(group["params"]))
        dense, rows = [p for p in members if p not in tables], [p for p in members if p in tables]
        groups += [{**group, "params": dense, "rows": False}] if dense else []
        groups += [{**table_defaults, **group, "params": rows, "rows": True}] if rows else []
    return groups


def _members(params: Any) -> Iterable[Any]:
    return [params] if isinstance(params, Tensor) else params


def _check_table(parameter: nn.Parameter) -> None:
    if parameter.dtype not in STATE or not parameter.is_contiguous():
        raise ValueError(
            f"a table of {parameter.dtype} with strides {parameter.stride()}: expected contiguous rows in float32, "
            "bfloat16 or float64."
        )
