"""Soft merging: experts that each have a dense change of all weights."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixwright.experts.base import AbstractDeltas, key_of
from mixwright.routing import Routing


class DenseDeltas(AbstractDeltas):
    """theta + sum_m w_m delta_m: M changes of their own, no masks (soft merging, Muqeeth et al. 2024).

    With one expert, whose weight is always 1, it is full meta-tuning (P>M>F, Hu et al. 2022). `shapes`: of the
    parameters that may change, by name. Parameters: `delta.<key>` (experts, *shape), 0 at first; a key is a name with
    "/" for ".". Experts that are `frozen` stay what they are through training.
    """

    frozen: Tensor

    def __init__(self, shapes: Mapping[str, torch.Size], num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.names = tuple(shapes)
        self.delta = nn.ParameterDict(
            {key_of(name): torch.zeros(num_experts, *shape) for name, shape in shapes.items()}
        )
        self.register_buffer("frozen", torch.zeros(num_experts, dtype=torch.bool), persistent=False)
        self._kept: dict[str, Tensor] = {}

    def forward(self, routing: Routing) -> dict[str, Tensor]:
        """sum_m w_m delta_m by name."""
        if self.training and not self._kept and bool(self.frozen.any()):
            self._kept = {key: delta.detach()[self.frozen].clone() for key, delta in self.delta.items()}
        weights = routing.dense()
        changes = {name: self.delta[key_of(name)] for name in self.names}
        return {
            name: torch.einsum("m, m ... -> ...", weights.to(delta.dtype), delta) for name, delta in changes.items()
        }

    @torch.no_grad()
    def norms(self) -> Float[Tensor, " experts"]:
        """As the base class says."""
        squares = [delta.flatten(1).float().square().sum(1) for delta in self.delta.values()]
        return torch.stack(squares).sum(0).sqrt()

    @torch.no_grad()
    def sparsity(self) -> Float[Tensor, " experts"]:
        """As the base class says: changes that are exactly 0; none, once an expert has learned."""
        acting = torch.stack([(delta != 0).flatten(1).sum(1) for delta in self.delta.values()]).sum(0)
        return (1.0 - acting.double() / self.num_weights).float()

    @property
    def num_weights(self) -> int:
        """P, the weights that may change."""
        return sum(delta[0].numel() for delta in self.delta.values())

    def freeze(self, expert: int, frozen: bool = True) -> None:
        """As the base class says."""
        self.frozen[expert] = frozen
        self._kept.clear()

    @torch.no_grad()
    def after_step(self) -> None:
        """After an optimiser's step: frozen experts as they were."""
        for key, before in self._kept.items():
            self.delta[key][self.frozen] = before
