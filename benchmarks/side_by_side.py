"""PHATGOOSE's two stages for several experts at once: their batches lie one below the other.

Each row meets its own expert. The backbone is frozen and the experts share nothing, so training them in one forward
gives what training each alone gives, at a fraction of the time: the loss is the sum of the experts' mean losses, and
gradients are clipped per expert.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel
from mixwright.experts.base import AbstractExperts
from mixwright.routers.base import AbstractRouter
from mixwright.routers.constant import ConstantRouter
from mixwright.routing import Condition, Routing
from mixwright.sites import Site

Losses = Callable[[ComposedModel, int], Tensor]
"""(model, step) -> the mean loss of each expert's rows, `(experts,)`."""


@dataclass(frozen=True, kw_only=True)
class Stages:
    """How the two stages are run; the paper has rank 16, alpha 1, 1000 and 100 steps at 5e-3."""

    rank: int = 16
    alpha: float = 16.0
    learning_rate: float = 5e-3
    warmup: float = 0.06
    clip: float = 1.0
    expert_steps: int = 250
    gate_steps: int = 100


@dataclass
class Parts:
    """Stacked experts: site -> down (experts, rank, d_in), up (experts, d_out, rank), gates (experts, d_in)."""

    scale: float
    down: dict[str, Tensor] = field(default_factory=dict)
    up: dict[str, Tensor] = field(default_factory=dict)
    gates: dict[str, Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many experts there are."""
        return next(iter(self.down.values())).shape[0]

    def state(self) -> dict[str, Tensor]:
        """All tensors by `<kind>/<site>`, for a file."""
        kinds = {"down": self.down, "up": self.up, "gates": self.gates}
        named = {f"{kind}/{site}": t.contiguous() for kind, sites in kinds.items() for site, t in sites.items()}
        return {**named, "scale": torch.tensor(self.scale)}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "Parts":
        """The inverse of `state`."""
        parts = cls(float(state["scale"]))
        for name, tensor in state.items():
            kind, _, site = name.partition("/")
            if site:
                getattr(parts, kind)[site] = tensor
        return parts


class RowExperts(AbstractExperts):
    """The batch is E equal blocks of rows; block e meets expert e alone: y = w s B_e A_e x."""

    def __init__(self, down: Tensor, up: Tensor, scale: float) -> None:
        super().__init__()
        self.num_experts = 1  # of each row's choice: its own
        self.down, self.up, self.scale = nn.Parameter(down), nn.Parameter(up), scale

    def forward(self, x: Tensor, routing: Routing, condition: Condition) -> Tensor:
        """One pair of batched products."""
        del condition
        blocks = x.reshape(self.down.shape[0], -1, x.shape[-1])
        out = torch.bmm(torch.bmm(blocks, self.down.mT) * self.scale, self.up.mT)
        return out.reshape(*x.shape[:-1], -1) * routing.weights


class RowGates(AbstractRouter):
    """w = sigmoid(v_e . u) with e the row's own expert; v starts at zero."""

    def __init__(self, num_blocks: int, d_in: int) -> None:
        super().__init__()
        self.num_experts = 1
        self.gate = nn.Parameter(torch.zeros(num_blocks, d_in))

    def forward(self, x: Tensor, condition: Condition) -> Routing:
        """One weight for each token."""
        del condition
        blocks = x.reshape(self.gate.shape[0], -1, x.shape[-1])
        scores = torch.bmm(blocks, self.gate.unsqueeze(-1)).reshape(*x.shape[:-1], 1)
        return Routing(torch.sigmoid(scores), num_experts=1)


def fit(
    model: ComposedModel, parameters: list[nn.Parameter], losses: Losses, steps: int, stages: Stages
) -> list[float]:
    """AdamW, linear warm-up from 0 then constant, each expert's gradient clipped; the mean loss of each step."""
    optimiser = torch.optim.AdamW(parameters, lr=stages.learning_rate, weight_decay=0.0)
    warmup = max(1, int(stages.warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, step / warmup))
    history: list[float] = []
    for step in range(steps):
        loss = losses(model, step)
        loss.sum().backward()
        clip_each(parameters, stages.clip)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        history.append(float(loss.mean().detach()))
    return history


def clip_each(parameters: list[nn.Parameter], largest: float) -> None:
    """Clip the global norm of each expert's gradient; the expert axis comes first in every parameter."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
    factor = (largest / (norm + 1e-6)).clamp_max(1.0)
    for gradient in gradients:
        gradient.mul_(factor.view(-1, *[1] * (gradient.dim() - 1)))


def train_experts(
    backbone: nn.Module, sites: Mapping[str, Site], count: int, losses: Losses, stages: Stages, seed: int
) -> tuple[Parts, list[float]]:
    """Stage one: `count` LoRAs, A ~ N(0, 0.01^2) and B = 0, on every site; the backbone is as it was afterwards."""
    generator = torch.Generator().manual_seed(seed)
    scale = stages.alpha / stages.rank
    experts = {
        path: RowExperts(
            0.01 * torch.randn(count, stages.rank, site.d_in, generator=generator),
            torch.zeros(count, site.d_out, stages.rank),
            scale,
        )
        for path, site in sites.items()
    }
    always = ConstantRouter(torch.ones(1))
    mixtures = {path: Mixture(backbone.get_submodule(path), always, part) for path, part in experts.items()}
    model = ComposedModel(backbone, mixtures, ("own",))
    trained = [p for part in experts.values() for p in part.parameters()]
    history = fit(model, trained, losses, stages.expert_steps, stages)
    model.remove()
    down = {path: part.down.detach() for path, part in experts.items()}
    return Parts(scale, down, {path: part.up.detach() for path, part in experts.items()}), history


def train_gates(backbone: nn.Module, parts: Parts, losses: Losses, stages: Stages) -> list[float]:
    """Stage two: the experts are frozen, only the gate vectors learn; they are put into `parts`."""
    gates = {path: RowGates(parts.count, down.shape[-1]) for path, down in parts.down.items()}
    mixtures: dict[str, Mixture] = {}
    for path, gate in gates.items():
        experts = RowExperts(parts.down[path], parts.up[path], parts.scale).requires_grad_(False)
        mixtures[path] = Mixture(backbone.get_submodule(path), gate, experts)
    model = ComposedModel(backbone, mixtures, ("own",))
    history = fit(model, [gate.gate for gate in gates.values()], losses, stages.gate_steps, stages)
    model.remove()
    parts.gates = {path: gate.gate.detach() for path, gate in gates.items()}
    return history
