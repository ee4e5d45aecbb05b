"""Sparse interpolated experts: many masks over one change of all weights."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixwright.experts.base import AbstractDeltas, key_of
from mixwright.experts.members import Members
from mixwright.ops.hard_concrete import LIMIT, expected_l0, hard_count, mask
from mixwright.ops.interpolate import interpolate, interpolate_each
from mixwright.ops.mask_overlap import expected_overlap
from mixwright.ops.membership import interpolate_members, is_quick, sums_of
from mixwright.routing import Routing

Granularity = Literal["weight", "row", "tensor"]


class SparseDeltas(AbstractDeltas):
    """theta + (sum_m w_m z_m) * delta: M masks z_m in [0, 1] over one shared change (Chen et al. 2024, section 3).

    Since the weights w sum to 1, each coefficient is in [0, 1]: an interpolation, for each weight, between theta and
    theta + delta. `shapes`: of the parameters that may change, by name. Parameters: `delta.<key>` like the tensor, and
    `logits.<key>` (experts, *unit), one for each weight, row or tensor as `granularity` says; a key is a name with "/"
    for ".". `multipliers` (experts,): Lagrange multipliers of the sparsity constraint. Experts that
    are `frozen` stay what they are through training: their masks, and the change wherever they act.

    `noise`: in training, masks are drawn with concrete noise. `regrowth`: the slope with which masks at 0 and at 1
    still feel the task, since nothing else would bring a dead one back. `block_of`: the block of each parameter, where
    a routing (blocks, experts) may mix each block by itself; the rows are in the order of `blocks`.
    """

    frozen: Tensor

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        num_experts: int,
        granularity: Granularity = "weight",
        seed: int = 0,
        *,
        noise: bool = False,
        regrowth: float = 0.0,
        block_of: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.num_experts, self.noise, self.regrowth = num_experts, noise, regrowth
        self.names = tuple(shapes)
        self.delta = nn.ParameterDict({key_of(name): torch.zeros(shape) for name, shape in shapes.items()})
        self.logits = nn.ParameterDict(
            {
                key_of(name): torch.randn(num_experts, *unit_of(shape, granularity), generator=draw) * 0.5
                for name, shape in shapes.items()
            }
        )
        self.multipliers = nn.Parameter(torch.zeros(num_experts))
        self.register_buffer("frozen", torch.zeros(num_experts, dtype=torch.bool), persistent=False)
        self._block = dict.fromkeys(shapes, "") if block_of is None else {name: block_of[name] for name in shapes}
        self.blocks = () if block_of is None else tuple(dict.fromkeys(self._block.values()))
        sizes = [self.num_weights] if block_of is None else [self.size_of(block) for block in self.blocks]
        self.shares = tuple(size / self.num_weights for size in sizes)
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}
        self._members = Members()

    def forward(self, routing: Routing) -> dict[str, Tensor]:
        """(sum_m w_m z_m) * delta by name."""
        changes: dict[str, Tensor] = {}
        for name in self.names:
            delta, masks = self.change_of(name), self.masks(name)
            share = torch.einsum("m,m...->...", self.weights_at(name, routing.dense()).to(masks.dtype), masks)
            changes[name] = share.reshape(share.shape + (1,) * (delta.dim() - share.dim())) * delta
        return changes

    def onto(self, base: Mapping[str, Tensor], routing: Routing, strength: float = 1.0) -> dict[str, Tensor]:
        """As the base class says; what no acting expert unmasks keeps its bits. Gradients by the leaf trick."""
        weights = routing.dense()
        if not self.training and not torch.is_grad_enabled():
            return {n: self._served(n, base[n], self.weights_at(n, weights), strength) for n in self.names}
        return self.onto_each(base, [routing], strength)[0]

    def onto_each(
        self, base: Mapping[str, Tensor], routings: Sequence[Routing], strength: float = 1.0
    ) -> list[dict[str, Tensor]]:
        """`onto` under each routing: masks are made once for all of them, but where noise is drawn, for each anew."""
        noisy, served = self.noise and self.training, not self.training and not torch.is_grad_enabled()
        if served or (noisy and len(routings) > 1):
            return super().onto_each(base, routings, strength)
        seed = int(torch.randint(1 << 31, ())) if noisy else None
        if self.training and not self._kept:
            self._keep()
        mixtures = [routing.dense() for routing in routings]
        found: list[dict[str, Tensor]] = [{} for _ in routings]
        for index, name in enumerate(self.names):
            adapted = interpolate_each(
                base[name],
                self.change_of(name),
                self.logits_of(name),
                torch.stack([self.weights_at(name, mixture) for mixture in mixtures]),
                strength,
                noise=None if seed is None else seed + index,
                regrowth=self.regrowth,
            )
            for each, tensor in zip(found, adapted, strict=True):
                each[name] = tensor
        return found

    def change_of(self, name: str) -> nn.Parameter:
        """The shared change of one parameter."""
        return self.delta[key_of(name)]  # type: ignore[return-value]

    def logits_of(self, name: str) -> nn.Parameter:
        """The mask logits of one parameter, (experts, *unit)."""
        return self.logits[key_of(name)]  # type: ignore[return-value]

    def weights_at(self, name: str, weights: Float[Tensor, " *blocks experts"]) -> Float[Tensor, " experts"]:
        """The mixture of one parameter: that of its block, where blocks have their own."""
        return weights if weights.dim() == 1 else weights[self.blocks.index(self._block[name])]

    def size_of(self, block: str) -> int:
        """How many weights that may change lie in a block."""
        return sum(self._size(name) for name in self.names if self._block[name] == block)

    def mean_over_blocks(self, values: Float[Tensor, "*some rows experts"]) -> Float[Tensor, "*some experts"]:
        """As the base class says."""
        return (values.new_tensor(self.shares)[:, None] * values).sum(-2)

    def masks(self, name: str) -> Float[Tensor, " experts *unit"]:
        """z_m of one parameter."""
        return mask(self.logits_of(name))

    def expected_l0(self) -> Float[Tensor, " experts"]:
        """q_m: the smooth share of weights that act, by which the masks learn to be sparse."""
        total = self.num_weights
        parts = [expected_l0(self.logits_of(name)) * (self._size(name) / total) for name in self.names]
        return torch.stack(parts).sum(0)

    def expected_overlap(self) -> Float[Tensor, "experts experts"]:
        """E_j[q_mj q_nj]: the smooth share of weights on which two experts both act."""
        parts = [expected_overlap(self.logits_of(name)) * (self._size(name) / self.num_weights) for name in self.names]
        return torch.stack(parts).sum(0)

    @torch.no_grad()
    def sparsity(self) -> Float[Tensor, " experts"]:
        """The share of all weights that each expert masks out, counted: exact zeros, as they are served."""
        acting = torch.zeros(self.num_experts, dtype=torch.float64, device=self.multipliers.device)
        for name in self.names:
            logits = self.logits_of(name)
            acting += hard_count(logits).double() * (self._size(name) / max(logits[:1].numel(), 1))
        return (1.0 - acting / self.num_weights).float()

    @torch.no_grad()
    def norms(self) -> Float[Tensor, " experts"]:
        """|z_m * delta| of each expert."""
        return self._norms(self.names)

    @torch.no_grad()
    def norms_by_block(self) -> Float[Tensor, "blocks experts"]:
        """The same inside each block."""
        inside = ([name for name in self.names if self._block[name] == block] for block in self.blocks)
        return torch.stack([self._norms(names) for names in inside])

    @property
    def num_weights(self) -> int:
        """P, the weights that may change."""
        return sum(self._size(name) for name in self.names)

    def freeze(self, expert: int, frozen: bool = True) -> None:
        """Keep an expert through training as it is now, or let it learn again."""
        self.frozen[expert] = frozen
        self._kept.clear()

    @torch.no_grad()
    def binarise(self, rescale: bool = True) -> None:
        """Every mask to 0 or 1, whichever is nearer; 1/2 is 1.

        `rescale`: each weight's change is multiplied by the mean of the masks that became 1 there, the nearest that one
        shared change comes to what the experts were.
        """
        for name in self.names:
            logits, delta = self.logits_of(name), self.change_of(name)
            if rescale:
                kept = logits >= 0
                share = (mask(logits) * kept).sum(0) / kept.sum(0).clamp_min(1)
                share = share.masked_fill(~kept.any(0), 1.0)
                delta.mul_(share.reshape(share.shape + (1,) * (delta.dim() - share.dim())))
            logits.copy_(torch.where(logits >= 0, LIMIT, -LIMIT))

    @torch.no_grad()
    def after_step(self) -> None:
        """After an optimiser's step: logits within +- log 100, and frozen experts as they were."""
        for name in self.names:
            logits, delta = self.logits_of(name), self.change_of(name)
            logits.clamp_(-LIMIT, LIMIT)
            if name in self._kept:
                before, change = self._kept[name]
                logits[self.frozen] = before
                delta.copy_(torch.where(_alive(before, delta), change, delta))

    def _served(self, name: str, base: Tensor, weights: Tensor, strength: float) -> Tensor:
        """One adapted parameter without gradients: by a byte for each weight, where all its masks are 0 or 1."""
        delta, logits, scale = self.change_of(name), self.logits_of(name), strength * weights.float()
        quick = logits.shape[1:] == delta.shape == base.shape and is_quick(base, delta, weights)
        codes = self._members.find(name, logits) if quick else None
        if codes is None:
            return interpolate(base, delta, logits, weights, strength)
        return interpolate_members(base, delta, codes, sums_of(scale))

    def _keep(self) -> None:
        if bool(self.frozen.any()):
            for name in self.names:
                logits, delta = self.logits_of(name).detach(), self.change_of(name).detach()
                self._kept[name] = logits[self.frozen].clone(), delta.clone()

    def _norms(self, names: Iterable[str]) -> Tensor:
        total = torch.zeros(self.num_experts, device=self.multipliers.device)
        for name in names:
            masks, delta = self.masks(name).float(), self.change_of(name).float().square()
            total += masks.square().reshape(len(masks), -1) @ delta.reshape(max(masks[0].numel(), 1), -1).sum(1)
        return total.sqrt()

    def _size(self, name: str) -> int:
        return self.change_of(name).numel()


def unit_of(shape: torch.Size, granularity: Granularity) -> tuple[int, ...]:
    """The shape of one expert's mask of a parameter."""
    return {"weight": tuple(shape), "row": tuple(shape[:1]), "tensor": ()}[granularity]


def _alive(logits: Tensor, delta: Tensor) -> Tensor:
    """Where any of these masks is not 0, in the shape of the change."""
    alive = (mask(logits) != 0).any(0)
    return alive.reshape(alive.shape + (1,) * (delta.dim() - alive.dim())).expand(delta.shape)
