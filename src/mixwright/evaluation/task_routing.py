"""What a model routed by task has learned: who uses which latent expert, who is alike, and what each expert is worth.

Weights alone mislead, since latent experts differ in size: beside each weight stands the expert's exact share of the
task's update, from inner products of its parts. Nothing here needs data, and no update is built.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import log
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel
from mixwright.evaluation.contribution import depth_of
from mixwright.evaluation.linkage import Merge, average_linkage, leaf_order
from mixwright.evaluation.task_cost import count
from mixwright.experts.factored import AbstractFactored
from mixwright.ops.collapse import entropy, mutual_information
from mixwright.routers.base import AbstractRouter
from mixwright.routers.task import AbstractTaskRouter, TaskLogits

HEADS_SHOWN = 4
_TASKS_AT_ONCE = 32


@dataclass(frozen=True, kw_only=True)
class TaskTable:
    """One router: its weights for every task, and what they are like. Several sites may follow one router.

    `weights`: [task][position][expert]; of more than four positions the mean. With z the logits, w the weights and S
    experts, means over positions: `discreteness` mean binary entropy of sigmoid(z) / log 2 (0 on or off, 1 undecided);
    `sparsity` share of sigmoid(z) over 0.5 (both None where nothing is learned); `usage` entropy of the mean row over
    log S (1 all experts equally); `peakiness` 1 - mean entropy of a row / log S (0 uniform, 1 one expert per task);
    `separation` mutual information of task and expert / log S (0: every task has the same row). The last three are
    None where there is one expert. `agreement`: mean correlation, with the other routers, of the distances between
    tasks.
    """

    sites: list[str]
    positions: list[str]
    weights: list[list[list[float]]]
    discreteness: float | None
    sparsity: float | None
    usage: float | None
    peakiness: float | None
    separation: float | None
    agreement: float | None = None


@dataclass(frozen=True, kw_only=True)
class LayerParts:
    """One site: the update (1/r) A B of every task, taken apart by latent expert.

    Part s is D_s = (A_s B + A B_s) / 2r; the parts sum to the update. `share`: [task][order position][expert],
    <D_s, update> / norm(update)^2, sums to 1, negative where a part works against the others. `size`: norm(update) of
    each task; `change`: size / norm(W). `overlap`: cosines of the parts, mean over tasks and order positions.
    `cancelling`: sum_s norm(D_s)^2 / norm(update)^2, the mean over tasks.
    """

    site: str
    depth: str
    router: int
    share: list[list[list[float]]]
    size: list[float]
    change: list[float] | None
    overlap: list[list[float]]
    cancelling: float


@dataclass(frozen=True, kw_only=True)
class TaskRouting:
    """A model routed by task, in plain lists. `merges` is the tree of tasks by average linkage, in scipy's numbering,
    over `distances`: total variation between two tasks' weights, mean over sites (0 the same, 1 no expert in common).
    """

    tasks: list[str]
    experts: list[str]
    routers: list[TaskTable]
    layers: list[LayerParts]
    distances: list[list[float]]
    merges: list[Merge]
    order: list[int]
    agreement: float | None
    cost: Mapping[str, int]
    composition: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def change(self, task: int) -> float | None:
        """How far a task moves the layers, norm(update) / norm(W), mean over sites."""
        changes = [layer.change[task] for layer in self.layers if layer.change is not None]
        return sum(changes) / len(changes) if changes else None

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain dictionaries and lists for JSON, numbers to six digits."""
        return _rounded(asdict(self))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in cast(dict[str, Any], value).items()}
    return [_rounded(item) for item in cast(list[Any], value)] if isinstance(value, list | tuple) else value


def is_task_routed(model: ComposedModel) -> bool:
    """Whether every site mixes factors by a choice that depends on the task alone, or on nothing."""
    return bool(model.mixtures) and all(isinstance(m.experts, AbstractFactored) for m in model.mixtures.values())


@torch.no_grad()
def task_routing(model: ComposedModel) -> TaskRouting:
    """Read a model's routing by task off its parameters. Raises ValueError for a model that is not routed by task."""
    if not is_task_routed(model):
        raise ValueError("this model is not routed by task; explain it with a text: `mixwright explain FOLDER --text`.")
    tasks = _task_names(model)
    mixtures, routers = model.mixtures, dict[int, tuple[AbstractRouter, list[str]]]()
    for site, mixture in mixtures.items():
        routers.setdefault(id(mixture.router), (mixture.router, []))[1].append(site)
    tables = [_table(router, len(tasks), sites) for router, sites in routers.values()]
    places = {key: place for place, key in enumerate(routers)}
    layers = [
        _layer(mixture, places[id(mixture.router)], tables[places[id(mixture.router)]]) for mixture in mixtures.values()
    ]
    distances = [_distances(table) for table in tables]
    sites = torch.tensor([float(len(sites)) for _, sites in routers.values()])
    mean = sum(weight * distance for weight, distance in zip(sites / sites.sum(), distances))
    assert isinstance(mean, Tensor)
    agreements = _agreements(distances)
    known = [value for value in agreements if value is not None]
    merges = average_linkage(mean)
    return TaskRouting(
        tasks=tasks,
        experts=list(model.experts),
        routers=[
            _described(router, table, sites, agreement, heads=_heads(mixtures[sites[0]]))
            for (router, sites), table, agreement in zip(routers.values(), tables, agreements)
        ],
        layers=layers,
        distances=mean.tolist(),
        merges=merges,
        order=leaf_order(merges, len(tasks)),
        agreement=sum(known) / len(known) if known else None,
        cost=asdict(count(model)),
        composition=asdict(model.composition),
    )


def _task_names(model: ComposedModel) -> list[str]:
    """The names that were composed with; numbers where a router knows more tasks than have names."""
    routers = [m.router for m in model.mixtures.values() if isinstance(m.router, AbstractTaskRouter)]
    named = [str(name) for name in model.composition.config.get("tasks") or ()]
    count = max((router.num_tasks for router in routers), default=max(1, len(named)))
    return [*named[:count], *(f"task {number}" for number in range(len(named), count))] if routers or named else ["any"]


def weights_of(router: AbstractRouter, tasks: int) -> Float[Tensor, "tasks positions experts"]:
    """The weights of every task, in float64 on the CPU; of a router that asks nobody, the same row for all."""
    told = isinstance(router, AbstractTaskRouter)
    table = (router.table() if told else router.get_buffer("weights").expand(tasks, -1)).detach().double().cpu()
    return table[:, None] if table.dim() == 2 else table


def _table(router: AbstractRouter, tasks: int, sites: Sequence[str]) -> Float[Tensor, "tasks positions experts"]:
    """Those weights, if they can be explained."""
    table = weights_of(router, tasks)
    if len(table) != tasks or not table.isfinite().all():
        fault = f"{len(table)} tasks, others {tasks}" if len(table) != tasks else "weights that are not finite"
        raise ValueError(f"the router of {sites[0]} has {fault}; this routing can't be explained.")
    return table


def _heads(mixture: Mixture) -> str:
    """What the positions of a site's router are: orders where parts are told apart by order, heads otherwise."""
    orders = getattr(mixture.experts, "order", None) == getattr(mixture.experts, "positions", None)
    return "order" if orders else "head"


def _described(
    router: AbstractRouter, table: Tensor, sites: list[str], agreement: float | None, *, heads: str
) -> TaskTable:
    positions = table.shape[1]
    shown = table if positions <= HEADS_SHOWN else table.mean(1, keepdim=True)
    names = [f"{heads} {number + 1}" for number in range(positions)] if 1 < positions <= HEADS_SHOWN else [""]
    return TaskTable(
        sites=sites,
        positions=names if shown.shape[1] > 1 else [f"mean of {positions} {heads}s" if positions > 1 else ""],
        weights=shown.tolist(),
        **gates_of(router),
        **shape_of(table),
        agreement=agreement,
    )


def gates_of(router: AbstractRouter) -> dict[str, float | None]:
    """Discreteness and sparsity of a router's gates, as `TaskTable` defines them; None for one without gates."""
    if not isinstance(router, TaskLogits):
        return {"discreteness": None, "sparsity": None}
    gates = torch.sigmoid(router.logits.detach().double())
    return {
        "discreteness": float(entropy(torch.stack([gates, 1 - gates], -1)).mean()) / log(2),
        "sparsity": float((gates > 0.5).double().mean()),
    }


def shape_of(table: Float[Tensor, "tasks positions experts"]) -> dict[str, float | None]:
    """Usage, peakiness and separation of a table of weights, as `TaskTable` defines them."""
    most = log(table.shape[-1])
    if not most:
        return {"usage": None, "peakiness": None, "separation": None}
    rows = _normalised(table)
    return {
        "usage": float(entropy(rows.mean(0)).mean()) / most,
        "peakiness": 1 - float(entropy(rows).mean()) / most,
        "separation": float(mutual_information(rows).mean()) / most,
    }


def _normalised(table: Tensor) -> Tensor:
    return table / table.sum(-1, keepdim=True).clamp_min(1e-300)


def _distances(table: Float[Tensor, "tasks positions experts"]) -> Float[Tensor, "tasks tasks"]:
    rows = _normalised(table)
    return torch.cdist(rows.flatten(1), rows.flatten(1), p=1) / (2 * table.shape[1])


def _agreements(distances: Sequence[Float[Tensor, "tasks tasks"]]) -> list[float | None]:
    """For each router the mean correlation of its distances with the other routers'; None where it can't be told."""
    tasks = len(distances[0])
    above = torch.triu_indices(tasks, tasks, 1)
    pairs = torch.stack([distance[above[0], above[1]] for distance in distances])
    if pairs.shape[1] < 3 or len(pairs) < 2:
        return [None] * len(pairs)
    centred = pairs - pairs.mean(1, keepdim=True)
    length = centred.norm(dim=1, keepdim=True)
    told = (length > 1e-9 * pairs.abs().amax(1, keepdim=True).clamp_min(1e-12)).squeeze(1)
    unit = torch.where(told[:, None], centred / length.clamp_min(1e-300), torch.zeros(()).double())
    others = told.sum() - 1
    if others < 1:
        return [None] * len(pairs)
    means = ((unit @ unit.sum(0)) - 1) / others
    return [float(mean) if known else None for mean, known in zip(means, told)]


def products_of(
    experts: AbstractFactored, table: Float[Tensor, "tasks positions experts"]
) -> Float[Tensor, "tasks orders experts experts"]:
    """Inner products of the experts' parts of every task's update, some tasks at a time: see `contribution`."""
    weights = table.squeeze(1) if experts.positions is None else table.expand(-1, experts.positions, -1)
    chunks = weights.to(next(experts.parameters()).device).split(_TASKS_AT_ONCE)
    return torch.cat([experts.contribution(chunk).double().cpu() for chunk in chunks])


def _layer(mixture: Mixture, router: int, table: Float[Tensor, "tasks positions experts"]) -> LayerParts:
    experts = mixture.experts
    assert isinstance(experts, AbstractFactored)
    products = products_of(experts, table)
    total = products.sum((-2, -1))
    size = total.mean(1).clamp_min(0).sqrt()
    alive = (total > 0)[..., None]
    share = torch.where(alive, products.sum(-1) / total.clamp_min(1e-300)[..., None], torch.zeros(()).double())
    mass = products.diagonal(dim1=-2, dim2=-1).clamp_min(0)
    lengths = mass.sqrt()
    cosines = products / (lengths[..., :, None] * lengths[..., None, :]).clamp_min(1e-300)
    weight = getattr(mixture.base, "weight", None)
    frozen = float(weight.detach().float().norm()) if isinstance(weight, Tensor) else 0.0
    ratio = (mass.sum(-1) / total.clamp_min(1e-300))[alive.squeeze(-1)]
    return LayerParts(
        site=mixture.site,
        depth=depth_of(mixture.site),
        router=router,
        share=share.tolist(),
        size=size.tolist(),
        change=(size / frozen).tolist() if frozen else None,
        overlap=cosines.mean((0, 1)).tolist(),
        cancelling=float(ratio.mean()) if ratio.numel() else 0.0,
    )
