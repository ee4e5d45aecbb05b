"""Sparse interpolated experts: many masks over one change of all weights."""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixwright.experts.base import AbstractDeltas
from mixwright.ops.hard_concrete import LIMIT, expected_l0, mask
from mixwright.ops.interpolate import interpolate
from mixwright.routing import Routing

Granularity = Literal["weight", "row", "tensor"]


class SparseDeltas(AbstractDeltas):
    """theta + (sum_m w_m z_m) * delta: M masks z_m in [0, 1] over one shared change (Chen et al. 2024, section 3).

    Since the weights w sum to 1, each coefficient is in [0, 1]: an interpolation, for each weight, between theta and
    theta + delta. `shapes`: of the parameters that may change, by name. Parameters: `delta.<key>` like the tensor, and
    `logits.<key>` (experts, *unit), one for each weight, row or tensor as `granularity` says; a key is a name with "/"
    for ".". `multipliers` (experts,): Lagrange multipliers of the sparsity constraint.
    """

    def __init__(
        self, shapes: Mapping[str, torch.Size], num_experts: int, granularity: Granularity = "weight", seed: int = 0
    ) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.num_experts = num_experts
        self.names = tuple(shapes)
        self.delta = nn.ParameterDict({_key(name): torch.zeros(shape) for name, shape in shapes.items()})
        self.logits = nn.ParameterDict(
            {
                _key(name): torch.randn(num_experts, *_unit(shape, granularity), generator=draw) * 0.5
                for name, shape in shapes.items()
            }
        )
        self.multipliers = nn.Parameter(torch.zeros(num_experts))

    def forward(self, routing: Routing) -> dict[str, Tensor]:
        """(sum_m w_m z_m) * delta by name."""
        changes: dict[str, Tensor] = {}
        for name in self.names:
            delta, masks = self.delta[_key(name)], self.masks(name)
            share = torch.einsum("m,m...->...", routing.dense().to(masks.dtype), masks)
            changes[name] = share.reshape(share.shape + (1,) * (delta.dim() - share.dim())) * delta
        return changes

    def onto(self, base: Mapping[str, Tensor], routing: Routing, strength: float = 1.0) -> dict[str, Tensor]:
        """As the base class says; what no acting expert unmasks keeps its bits. Gradients by the leaf trick."""
        weights = routing.dense()
        return {
            name: interpolate(base[name], self.delta[_key(name)], self.logits[_key(name)], weights, strength)
            for name in self.names
        }

    def masks(self, name: str) -> Float[Tensor, " experts *unit"]:
        """z_m of one parameter."""
        return mask(self.logits[_key(name)])

    def expected_l0(self) -> Float[Tensor, " experts"]:
        """q_m: the smooth share of weights that act, by which the masks learn to be sparse."""
        sizes = self._sizes()
        total = sum(sizes.values())
        parts = [expected_l0(self.logits[_key(name)]) * (sizes[name] / total) for name in self.names]
        return torch.stack(parts).sum(0)

    @torch.no_grad()
    def sparsity(self) -> Float[Tensor, " experts"]:
        """The share of weights that each expert masks out, counted: exact zeros."""
        sizes = self._sizes()
        dead = sum((self.masks(name).flatten(1) == 0).double().mean(1) * sizes[name] for name in self.names)
        assert isinstance(dead, Tensor)
        return (dead / sum(sizes.values())).float()

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep logits within +- log 100."""
        for logits in self.logits.values():
            logits.clamp_(-LIMIT, LIMIT)

    def _sizes(self) -> dict[str, int]:
        return {name: self.delta[_key(name)].numel() for name in self.names}


def _key(name: str) -> str:
    return name.replace(".", "/")


def _unit(shape: torch.Size, granularity: Granularity) -> tuple[int, ...]:
    return {"weight": tuple(shape), "row": tuple(shape[:1]), "tensor": ()}[granularity]
