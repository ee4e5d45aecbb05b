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
    "/" for ".".
    """

    def __init__(self, shapes: Mapping[str, torch.Size], num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.names = tuple(shapes)
        self.delta = nn.ParameterDict(
            {key_of(name): torch.zeros(num_experts, *shape) for name, shape in shapes.items()}
        )

    def forward(self, routing: Routing) -> dict[str, Tensor]:
        """sum_m w_m delta_m by name."""
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
