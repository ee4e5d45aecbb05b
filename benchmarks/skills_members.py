"""The systems of the skills suite: one layer of the library's parts for each, trained by the library's loop.

The layer is a `Mixture` without a base: a frozen base adds the same to output and target, and only costs time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from benchmarks.skills_world import Examples
from mixwright.composition.mixture import Mixture
from mixwright.data.collate import Batch
from mixwright.experts.base import AbstractExperts
from mixwright.experts.factored import AbstractFactored
from mixwright.experts.poly import PolyExperts
from mixwright.experts.tensor import OrderedTensorExperts, TensorExperts
from mixwright.methods.tensorpoly.config import TensorPolyConfig
from mixwright.methods.tensorpoly.initial import first_factors, first_logits
from mixwright.methods.tensorpoly.latent import assemble, positions
from mixwright.routers.base import AbstractRouter
from mixwright.routers.constant import ConstantRouter
from mixwright.routers.task import AbstractTaskRouter, TaskLogits, TaskRouter
from mixwright.routing import Condition, Routing
from mixwright.training.optimizers import make_optimizers, set_rate
from mixwright.training.stage import ParamGroup, Stage, select_parameters

What = Literal["all", "z", "mu"]
"""What a new task trains: experts and its row of Z, that row alone, or the experts under uniform routing."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A system: settings of a `TensorPolyConfig`; `private` gives every task a LoRA of its own."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    private: bool = False
    budget: str = ""

    def config(self, tasks: int) -> TensorPolyConfig:
        """The settled config for so many tasks."""
        own = {"num_latent": tasks} if self.private else {}
        names = tuple(f"task-{i}" for i in range(tasks))
        return TensorPolyConfig(tasks=names, **{**self.settings, **own}).settled()

    @property
    def transfers(self) -> tuple[What, ...]:
        """What there is to train for a new task: without a router only the experts."""
        return ("all", "z", "mu") if self.config(2).is_routed and not self.private else ("all",)


class TaskLayer(nn.Module):
    """y = sum over experts of one mixture, for rows of the batch that belong to tasks."""

    def __init__(self, router: AbstractRouter, experts: AbstractExperts) -> None:
        super().__init__()
        self.mixture = Mixture(None, router, experts)

    @property
    def router(self) -> AbstractRouter:
        return self.mixture.router

    @property
    def experts(self) -> AbstractFactored:
        found = self.mixture.experts
        assert isinstance(found, AbstractFactored)
        return found

    def forward(self, x: Tensor, task_ids: Tensor) -> Tensor:
        self.mixture.channel.condition = Condition(task_ids=task_ids)
        return self.mixture(x)

    def weights(self, tasks: int) -> Tensor:
        """The routing weights of every task, `(tasks, [positions,] experts)`."""
        if isinstance(self.router, AbstractTaskRouter):
            return self.router.table().detach()
        return self.router.get_buffer("weights").expand(tasks, -1)


class OwnBlock(AbstractRouter):
    """Row t of the batch meets the t-th copy of the experts, and within it what `inner` says."""

    def __init__(self, inner: AbstractRouter, copies: int) -> None:
        super().__init__()
        self.inner, self.copies = inner, copies
        self.num_experts = copies * inner.num_experts

    def forward(self, x: Tensor, condition: Condition) -> Routing:
        weights = self.inner(x, condition).weights
        if weights.dim() == 1:
            weights = weights.expand(self.copies, 1, -1)
        own = torch.eye(self.copies).view(self.copies, *[1] * (weights.dim() - 2), self.copies, 1)
        return Routing((weights.unsqueeze(-2) * own).flatten(-2), self.num_experts)


def fresh(member: Member, width: int, tasks: int, seed: int) -> TaskLayer:
    """A member before training."""
    config, draw = member.config(tasks), torch.Generator().manual_seed(seed)
    down, up = first_factors(config, width, width, draw)
    experts = assemble(config, down, up, width, width)
    if member.private:
        return TaskLayer(TaskRouter(torch.eye(tasks)), experts)
    return TaskLayer(_router(config, tasks, draw), experts)


def _router(config: TensorPolyConfig, tasks: int, draw: torch.Generator) -> AbstractRouter:
    latent, apart = config.num_latent or 1, positions(config)
    if not config.is_routed:
        return ConstantRouter(torch.ones(latent))
    return TaskLogits(first_logits((tasks, latent) if apart is None else (tasks, apart, latent), draw))


def train(
    layer: TaskLayer, data: Examples, steps: int, lr: float | None, router_lr: float | None, cooldown: float = 0.94
) -> TaskLayer:
    """The published schedule (or another cooldown), every example in every step; None leaves experts or Z frozen.

    These are the updates of `mixwright.training.fit`, to the bit, without what it does for safety and many processes.
    """
    groups: list[ParamGroup] = []
    if lr is not None:
        groups.append(ParamGroup(select=("*.experts.*",), lr=lr))
    if router_lr is not None and any(True for _ in layer.router.parameters()):
        groups.append(ParamGroup(select=("*.router.*",), lr=router_lr))
    stage = Stage(name="skills", groups=tuple(groups), steps=steps, warmup=0.06, cooldown=cooldown, clip=None)
    chosen, batch = select_parameters(layer.train().requires_grad_(False), stage.groups), as_batch(data)
    for parameter in (parameter for group in chosen for parameter in group.values()):
        parameter.requires_grad_(True)
    optimizers = make_optimizers(layer, stage, chosen)
    for step in range(steps):
        set_rate(optimizers, stage.rate(step))
        (squared(layer, batch) / batch.weight).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return layer.requires_grad_(False).eval()


def as_batch(data: Examples) -> Batch:
    """One row for each task."""
    rows = data.x.shape[0] * data.x.shape[1]
    return Batch("encoder", {"x": data.x}, data.y, rows, task_ids=torch.arange(len(data.x)))


def squared(model: Any, batch: Batch) -> Tensor:
    """The summed squared error. Side by side tasks share nothing: Adam's steps do not depend on the loss's scale."""
    return mse_loss(model(batch.inputs["x"], batch.task_ids), batch.targets, reduction="sum")


def transfer(
    layer: TaskLayer, member: Member, what: What, shots: Examples, steps: int, lr: float, seed: int
) -> TaskLayer:
    """New tasks side by side, each from its own few shots and a fresh row of Z; `layer` stays as it is.

    `lr` is that of the experts, and of Z where Z alone is trained.
    """
    tasks, config = len(shots.x), member.config(len(shots.x))
    if member.private:
        return train(fresh(member, shots.x.shape[-1], tasks, seed), shots, steps, lr, None)
    router = _router(config, tasks, torch.Generator().manual_seed(seed))
    if what == "z":
        return train(TaskLayer(router, layer.experts), shots, steps, None, lr)
    if what == "mu":
        router = ConstantRouter(torch.full((config.num_latent or 1,), 1 / (config.num_latent or 1)))
    return train(TaskLayer(OwnBlock(router, tasks), copies(layer.experts, tasks)), shots, steps, lr, 0.1)


def copies(experts: AbstractFactored, count: int) -> AbstractFactored:
    """`count` copies of the experts in one module, along the expert axis."""

    def repeated(tensor: Tensor) -> Tensor:
        return tensor.detach().repeat(count, *[1] * (tensor.dim() - 1))

    if isinstance(experts, PolyExperts):
        return PolyExperts(repeated(experts.down), repeated(experts.up), experts.heads)
    assert isinstance(experts, TensorExperts | OrderedTensorExperts)
    down, up = [repeated(leaf) for leaf in experts.down], [repeated(leaf) for leaf in experts.up]
    return type(experts)(down, up, experts.d_in, experts.d_out, experts.norm)


@torch.no_grad()
def errors(layer: TaskLayer, data: Examples) -> Tensor:
    """Mean squared error of each task over its targets' power: 1 is what the frozen backbone has."""
    gap = layer.eval()(data.x, torch.arange(len(data.x))) - data.y
    return gap.square().mean((1, 2)) / data.y.square().mean((1, 2))


@torch.no_grad()
def merged_gap(layer: TaskLayer, data: Examples) -> float:
    """Largest difference, relative to the largest output, between each task's merged weight and the layer."""
    ids = torch.arange(len(data.x))
    out = layer.eval()(data.x, ids)
    down, up = layer.experts.factors(layer.weights(len(ids)))
    merged = torch.einsum("trp,trq->tpq", down, up) / layer.experts.rank
    return float((data.x @ merged - out).abs().max() / out.abs().max())


def numbers(member: Member, width: int, tasks: int) -> dict[str, int]:
    """What is stored, what of Z for one task, what a transfer trains, and what one merged task has."""
    layer = fresh(member, width, tasks, 0)
    stored = sum(p.numel() for p in layer.experts.parameters())
    router = sum(p.numel() for p in layer.router.parameters())
    rank = layer.experts.rank
    return {
        "stored": stored,
        "router": router,
        "router_per_task": router // tasks,
        "transfer_all": (stored // tasks if member.private else stored) + router // tasks,
        "transfer_z": router // tasks,
        "merged": 2 * rank * width,
        "merged_rank": rank,
    }


def routing_numbers(weights: Tensor) -> dict[str, float]:
    """Of `(tasks, [positions,] experts)`: entropy of a row and of the mean row over log experts; the largest."""
    if weights.shape[-1] == 1:
        return {}
    scale = torch.tensor(float(weights.shape[-1])).log()

    def entropy(rows: Tensor) -> float:
        return float((torch.special.entr(rows).sum(-1) / scale).mean())

    return {
        "entropy": entropy(weights),
        "usage": entropy(weights.mean(0)),
        "peak": float(weights.max(-1).values.mean()),
    }
