"""What is wrong with a model's routing by task, in words: routing that collapsed, experts that do nothing."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isfinite

from mixwright.evaluation.task_routing import LayerParts, TaskRouting, TaskTable

SAME = 0.01
"""Separation below which a router tells no tasks apart."""
ONE_SIDED = 0.5
"""Usage below which a router leans on few experts."""
DEAD = 0.01
"""Part of an even share that an expert must reach for some task."""
CANCELLING = 10.0
"""How much more the parts of an update hold, squared and summed, than the update."""
_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """One thing that is wrong, at these sites."""

    kind: str
    sites: list[str]
    text: str


def task_alarms(routing: TaskRouting) -> list[Alarm]:
    """Everything that a reader should know before believing the rest; empty where nothing is wrong."""
    found = [_lost(routing), _untrained(routing)]
    if found[1] is None:
        found += [_uniform(routing), _collapsed(routing), _dead(routing), _cancelling(routing)]
    return [alarm for alarm in found if alarm is not None]


def _alarm(kind: str, routing: TaskRouting, sites: Sequence[str], before: str, after: str) -> Alarm | None:
    if not sites:
        return None
    everywhere = len(sites) == len(routing.layers)
    where = "in every layer" if everywhere else f"in {len(sites)} of {len(routing.layers)} layers"
    tail = "" if everywhere else f" ({_listed(sites)})"
    return Alarm(kind=kind, sites=list(sites), text=f"{before} {where}{after}{tail}.")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _sites(layers: Iterable[LayerParts], wrong: Callable[[LayerParts], bool]) -> list[str]:
    return [layer.site for layer in layers if wrong(layer)]


def _following(tables: Iterable[TaskTable], wrong: Callable[[TaskTable], bool]) -> list[str]:
    return [site for table in tables if wrong(table) for site in table.sites]


def _lost(routing: TaskRouting) -> Alarm | None:
    sites = _sites(routing.layers, lambda layer: not all(map(isfinite, layer.size)))
    return _alarm("not finite", routing, sites, "Updates hold NaN or infinity", ": training diverged")


def _untrained(routing: TaskRouting) -> Alarm | None:
    if any(any(layer.size) for layer in routing.layers):
        return None
    sites = [layer.site for layer in routing.layers]
    after = ": the model is still its backbone, train it first"
    return _alarm("untrained", routing, sites, "The update of every task is zero", after)


def _uniform(routing: TaskRouting) -> Alarm | None:
    if len(routing.tasks) < 2:
        return None

    def same(table: TaskTable) -> bool:
        return table.discreteness is not None and table.separation is not None and table.separation < SAME

    after = ": all of them share one mixture, as if there was no routing"
    return _alarm("uniform", routing, _following(routing.routers, same), "The router tells no tasks apart", after)


def _collapsed(routing: TaskRouting) -> Alarm | None:
    sites = _following(routing.routers, lambda table: table.usage is not None and table.usage < ONE_SIDED)
    return _alarm("collapsed", routing, sites, "All tasks lean on the same few latent experts", "")


def _dead(routing: TaskRouting) -> Alarm | None:
    experts = len(routing.experts)
    if experts < 2:
        return None

    def best(layer: LayerParts, expert: int) -> float:
        return max(abs(order[expert]) for task in layer.share for order in task)

    def idle(expert: int) -> list[str]:
        return _sites(routing.layers, lambda layer: any(layer.size) and best(layer, expert) < DEAD / experts)

    dead = {name: sites for place, name in enumerate(routing.experts) if (sites := idle(place))}
    sites = list(dict.fromkeys(site for found in dead.values() for site in found))
    return _alarm("dead", routing, sites, "Latent experts that add nothing for any task", f": {_listed(list(dead))}")


def _cancelling(routing: TaskRouting) -> Alarm | None:
    sites = _sites(routing.layers, lambda layer: layer.cancelling > CANCELLING)
    after = ": their parts, squared, sum to over ten times the update"
    return _alarm("cancelling", routing, sites, "Latent experts work against each other", after)
