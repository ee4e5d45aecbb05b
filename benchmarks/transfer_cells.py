"""The cells of the transfer suite: what is computed at one go and kept in one file."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.text_suite import load_backbone
from benchmarks.text_tasks import HELD_IN, HELD_OUT
from benchmarks.transfer_methods import (
    PRIVATE,
    Effort,
    accuracy,
    compose,
    draw_shots,
    learn,
    leaves,
    of_task,
    route,
    routed,
    routers,
    single,
    stored,
    train_together,
    uniform,
    ways,
)
from benchmarks.transfer_texts import StateTask, Top, load_tasks

RATES = (1e-2, 3e-2, 1e-1)
LOWER = (3e-3, 1e-3)
"""Learning rates of the experts together on all tasks. While the lowest is a method's best, it tries a lower one."""
SHOT_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
"""In transfer. So few validation rows say little of one method: the methods of a family share what is best for them."""
FAMILIES = (("LoRA, private", "LoRA, shared", "Poly", "MHR"), ("TLoRA", "TensorPoly-I", "TensorPoly-II", "entangled"))
DEVELOPMENT = ("cr", "trec", "emotion")
"""Held-in tasks that play the new ones where rates of few-shot transfer are chosen; its pools have not seen them."""
SHOTS = (16, 32)
TUNING_SEED = 1000


@dataclass(frozen=True, order=True)
class Cell:
    """`tune` a method, train a `pool`, or let a pool learn all held-out tasks from one draw of `shots`.

    `part` is the same as `shots` for the ways in which not everything learns.
    """

    kind: str
    size: str
    method: str
    seed: int
    draw: int

    def file(self, home: Path) -> Path:
        """Where the result is kept."""
        name = "-".join(self.method.lower().replace(",", "").split())
        numbers = {"tune": "", "pool": f".{self.seed}"}.get(self.kind, f".{self.seed}.{self.draw}")
        return home / f"{self.kind}.{self.size}.{name}{numbers}.json"

    def __str__(self) -> str:
        return f"{self.kind} {self.size} {self.method} seed {self.seed} draw {self.draw}"


class Bench:
    """What one process holds: states, last layers, and the folder of results."""

    def __init__(self, states: Path, home: Path, model: Path | None, effort: Effort, quick: bool = False) -> None:
        self.tasks = load_tasks(states)
        self.home, self.effort = home, effort
        self.rates, self.shot_rates = (RATES[1:2], SHOT_RATES[1:2]) if quick else (RATES, SHOT_RATES)
        self.top = Top(load_backbone(model)[0])

    def run(self, cell: Cell) -> str:
        """Compute a cell, keep it, and say in short what came out."""
        started = time.process_time()
        result, said = getattr(self, cell.kind)(cell)
        result["cpu_seconds"] = time.process_time() - started
        path = cell.file(self.home)
        fresh = path.with_suffix(".part")
        fresh.write_text(json.dumps(result))
        fresh.replace(path)
        return f"{said} ({result['cpu_seconds']:.0f} CPU-s)"

    def backbone(self) -> dict[str, float]:
        """Accuracy of the backbone as it is on the same rows."""
        return {name: _mean(accuracy(self.top, task.test, task.anchors)) for name, task in self.tasks.items()}

    def tune(self, cell: Cell) -> tuple[dict[str, Any], str]:
        """The best rate on validation rows of six tasks; with that pool, of transfer to the three others."""
        names = [name for name in HELD_IN if name not in DEVELOPMENT]
        sources = [self.tasks[name] for name in names]
        pools: dict[float, dict[str, Tensor]] = {}
        multitask: dict[float, float] = {}
        todo, lower = list(self.rates), list(LOWER)
        while todo:
            rate = todo.pop(0)
            model = compose(self.top, cell.method, cell.size, names, TUNING_SEED)
            train_together(model, sources, rate, self.effort, TUNING_SEED)
            pools[rate] = _state(model)
            multitask[rate] = sum(
                _mean(accuracy(model, task.validation, task.anchors, self._as(model, cell.method, number)))
                for number, task in enumerate(sources)
            ) / len(sources)
            model.remove()
            if not todo and lower and _best(multitask) == min(multitask):
                todo = [lower.pop(0)]
        best = _best(multitask)
        transfer: dict[str, dict[float, float]] = {}
        for what in ways(cell.method)[:2]:
            for rate in self.shot_rates:
                scores: list[float] = []
                for number, name in enumerate(DEVELOPMENT):
                    task, seed = self.tasks[name], TUNING_SEED + number
                    scores.append(self._few(cell, names, pools[best], what, rate, task, "validation", SHOTS[0], seed))
                transfer.setdefault(what, {})[rate] = sum(scores) / len(scores)
        result = {"rate": best, "validation": multitask, "transfer_validation": transfer}
        return result, f"rate {best}, transfer {transfer}"

    def pool(self, cell: Cell) -> tuple[dict[str, Any], str]:
        """Trained on all held-in tasks: their test accuracy, and that of the new ones before any shot."""
        tasks = [self.tasks[name] for name in HELD_IN]
        model = compose(self.top, cell.method, cell.size, list(HELD_IN), cell.seed)
        history = train_together(model, tasks, self._tuned(cell)["rate"], self.effort, cell.seed)
        held_in = {
            task.name: _mean(accuracy(model, task.test, task.anchors, self._as(model, cell.method, number)))
            for number, task in enumerate(tasks)
        }
        zero: dict[str, float] = {}
        if cell.method != PRIVATE:
            for name in HELD_OUT:
                way = uniform(model) if routed(cell.method) else None
                zero[name] = _mean(accuracy(model, self.tasks[name].test, self.tasks[name].anchors, way))
        save_file(_state(model), cell.file(self.home).with_suffix(".safetensors"))
        result = {"stored": stored(model, cell.method), "trained": _trained(model, cell.method), "held_in": held_in}
        model.remove()
        mean = sum(held_in.values()) / len(held_in)
        tenth = max(1, len(history) // 10)
        losses = [sum(part) / tenth for part in (history[:tenth], history[-tenth:])]
        result |= {"zero_shot": zero, "loss": losses}
        return result, f"loss {losses[0]:.3f} -> {losses[1]:.3f}, held-in {mean:.3f}"

    def shots(self, cell: Cell) -> tuple[dict[str, Any], str]:
        """All held-out tasks from one draw, everything learning."""
        return self._held_out(cell, ("all",))

    def part(self, cell: Cell) -> tuple[dict[str, Any], str]:
        """The same for the ways in which the row learns alone, or the experts."""
        return self._held_out(cell, ways(cell.method)[1:])

    def _held_out(self, cell: Cell, learning: tuple[str, ...]) -> tuple[dict[str, Any], str]:
        rates, state = self._tuned(cell)["rates"], dict[str, Tensor]()
        if cell.method != PRIVATE:
            pool = Cell("pool", cell.size, cell.method, cell.seed, 0)
            state = load_file(pool.file(self.home).with_suffix(".safetensors"))
        found: dict[str, dict[str, dict[str, float]]] = {}
        for what in learning:
            for shots in SHOTS:
                for number, name in enumerate(HELD_OUT):
                    seed = 10_000 * (cell.seed + 1) + 100 * cell.draw + number
                    task = self.tasks[name]
                    right = self._few(cell, list(HELD_IN), state, what, rates[what], task, "test", shots, seed)
                    found.setdefault(what, {}).setdefault(str(shots), {})[name] = right
        means = {w: [sum(found[w][str(s)].values()) / len(HELD_OUT) for s in SHOTS] for w in found}
        return {"accuracy": found}, ", ".join(f"{w} {' '.join(f'{m:.3f}' for m in means[w])}" for w in means)

    def _few(
        self, cell: Cell, names: list[str], state: dict[str, Tensor], what: str, rate: float, task: StateTask,
        split: str, shots: int, seed: int,
    ) -> float:  # fmt: skip
        """Accuracy on a task after learning it from shots, from a pool's state on or, for private LoRA, afresh."""
        if cell.method == PRIVATE:
            model = single(self.top, cell.size, seed)
        else:
            model = compose(self.top, cell.method, cell.size, names, cell.seed)
            _restore(model, state)
        chosen = draw_shots(task, shots, seed)
        learn(model, route(model, cell.method, what, len(names)), what, chosen, task.anchors, rate, self.effort, seed)
        way = route(model, cell.method, what, len(names))
        right = _mean(accuracy(model, getattr(task, split), task.anchors, way))
        model.remove()
        return right

    def _as(self, model: Any, method: str, number: int) -> Any:
        return of_task(model, number) if routed(method) or method == PRIVATE else None

    def _tuned(self, cell: Cell) -> dict[str, Any]:
        return tuned(self.home, cell.method)


def tuned(home: Path, method: str) -> dict[str, Any]:
    """A method's rate, and its family's `rates` of transfer."""
    files = {name: Cell("tune", "small", name, 0, 0).file(home) for family in FAMILIES for name in family}
    family = next(family for family in FAMILIES if method in family)
    found = {name: json.loads(files[name].read_text()) for name in family if files[name].exists()}
    rates: dict[str, float] = {}
    for what in ("all", "z"):
        tables = [one["transfer_validation"][what] for one in found.values() if what in one["transfer_validation"]]
        if tables:
            rates[what] = float(_best({rate: sum(table[rate] for table in tables) for rate in tables[0]}))
    return found[method] | {"rates": rates | {"mu": rates["all"]}}  # under mu the same numbers learn as under all


def _best(scores: dict[Any, float]) -> Any:
    return max(scores, key=lambda rate: scores[rate])


def _mean(right: list[int]) -> float:
    return sum(right) / len(right)


def _parts(model: Any) -> dict[str, nn.Parameter]:
    rows = {f"logits.{number}": router.logits for number, router in enumerate(routers(model))}
    return {f"leaf.{number}": leaf for number, leaf in enumerate(leaves(model))} | rows


def _state(model: Any) -> dict[str, Tensor]:
    return {name: part.detach().clone().contiguous() for name, part in _parts(model).items()}


def _restore(model: Any, state: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, part in _parts(model).items():
            part.copy_(state[name])


def _trained(model: Any, method: str) -> dict[str, int]:
    """Numbers that few-shot transfer trains, by way; of private LoRAs one is."""
    experts, row = sum(p.numel() for p in leaves(model)), sum(r.logits[-1].numel() for r in routers(model))
    if method == PRIVATE:
        return {"all": experts // len(HELD_IN)}
    counts = {"all": experts + row, "z": row, "mu": experts}
    return {what: counts[what] for what in ways(method)}
