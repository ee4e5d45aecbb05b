"""The slots of a hybrid as experts: pretrained embeddings, runs of layers, and heads, of different architectures."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from mixwright.experts.base import AbstractExperts
from mixwright.experts.folded import Folded, Members
from mixwright.experts.projectors import Projection, make_projector, resized
from mixwright.routing import Condition, Routing

Run = Callable[[int, Tensor | None], Tensor]
"""(component, hidden state or None) -> what leaves its part of this slot: `backbones.hybrid.Slot.run`."""


class AbstractComponents(AbstractExperts):
    """The components' part of one slot. Who acts is read off the routing alone: there is no condition."""

    def __init__(self, run: Run, num_components: int) -> None:
        super().__init__()
        self.run, self.num_experts = run, num_components
        self.members = Reader()

    @abstractmethod
    def under(self, members: Members, x: Tensor) -> Tensor:
        """The output when these members act."""

    def forward(
        self, x: Float[Tensor, "batch seq d_in"], routing: Routing, condition: Condition
    ) -> Float[Tensor, "batch d_seq d_out"]:
        """See AbstractExperts."""
        del condition
        return self.under(self.members(routing), x)

    def sole(self, routing: Routing) -> int | None:
        """The component that acts alone at weight 1, if one does."""
        return alone(self.members(routing))

    def direct(self, routing: Routing) -> Callable[[Tensor], Tensor]:
        """See AbstractExperts."""
        return partial(self.under, self.members(routing))


class EmbeddingExperts(AbstractComponents):
    """h_0 = sum_m alpha_m pad(E_m[x]): each component's own embedding, with all that comes before its first layer.

    A component that acts alone hands its own over as it is, of its own width.
    """

    def __init__(self, run: Run, widths: Sequence[int]) -> None:
        super().__init__(run, len(widths))
        self.width = max(widths)

    def under(self, members: Members, x: Tensor) -> Float[Tensor, "batch seq width"]:
        """The mixed stream; `x` is not read: components embed the pass's own tokens."""
        del x
        if (only := alone(members)) is not None:
            return self.run(only, None)
        return _mixed([(alpha, resized(self.run(m, None), self.width)) for m, alpha in members])


class BlockExperts(AbstractComponents):
    """One block of a hybrid, h <- sum_m alpha_m z_m, between gated residual projectors (Roberts et al. 2024).

    x_m = (1 - alpha_m) Win_m(h) + alpha_m trunc_m(h); y_m = layers_m(x_m); z_m = (1 - alpha_m) Wout_m(y_m) + alpha_m
    pad(y_m). The gate is the mixture weight itself; without gradients one affine map holds it and the projector, see
    `folded`. A component that acts alone, at weight 1, meets no projector and no arithmetic, and hands over a stream of
    its own width; a component that does not act does not run.
    """

    def __init__(self, run: Run, widths: Sequence[int], projectors: Projection = "linear") -> None:
        super().__init__(run, len(widths))
        self.widths, self.width = tuple(widths), max(widths)
        self.enter = nn.ModuleList(make_projector(projectors, self.width, d) or nn.Identity() for d in widths)
        self.leave = nn.ModuleList(make_projector(projectors, d, self.width) or nn.Identity() for d in widths)
        self.folded = Folded()

    def under(self, members: Members, x: Float[Tensor, "batch seq d_in"]) -> Float[Tensor, "batch d_seq d_out"]:
        """The stream after this block; the last block's may have the tokens only whose logits are asked for."""
        if (only := alone(members)) is not None:
            return self.run(only, resized(x, self.widths[only]))
        maps = self.folded(self.enter, self.leave, members, x)
        if maps is None:
            return _mixed([(alpha, self._through(m, alpha, x)) for m, alpha in members])
        h, run = resized(x, self.width), self.run
        outputs = [run(m, linear(h, weight, bias)) for m, weight, bias in maps.enter]
        if any(y.dtype != x.dtype for y in outputs):
            return _mixed([(alpha, self._left(m, alpha, y)) for (m, alpha), y in zip(members, outputs)])
        return maps.left(outputs)

    def _through(self, m: int, alpha: Tensor | None, x: Tensor) -> Tensor:
        assert alpha is not None
        y = self.run(m, _gated(self.enter[m], resized(x, self.width), resized(x, self.widths[m]), alpha))
        return self._left(m, alpha, y)

    def _left(self, m: int, alpha: Tensor | None, y: Tensor) -> Tensor:
        assert alpha is not None
        return _gated(self.leave[m], y, resized(y, self.width), alpha)


class HeadExperts(AbstractComponents):
    """logits = sum_m alpha_m H_m(trunc_m(h)), with each component's own post-processing."""

    def __init__(self, run: Run, widths: Sequence[int]) -> None:
        super().__init__(run, len(widths))
        self.widths = tuple(widths)

    def under(self, members: Members, x: Float[Tensor, "batch seq d_in"]) -> Float[Tensor, "batch d_seq vocab"]:
        """The mixed logits."""
        if (only := alone(members)) is not None:
            return self.run(only, resized(x, self.widths[only]))
        return _mixed([(alpha, self.run(m, resized(x, self.widths[m]))) for m, alpha in members])


class Reader:
    """Who acts under a routing. What it read of one that is not being learned, it remembers until another comes."""

    def __init__(self) -> None:
        self._seen: tuple[Routing, int, Members] | None = None

    def __call__(self, routing: Routing) -> Members:
        """The members in the order of their ids, or as the routing names them."""
        weights = routing.weights
        if weights.requires_grad or weights.is_inference():
            return acting(routing)
        if self._seen is None or self._seen[0] is not routing or self._seen[1] != weights._version:
            self._seen = (routing, weights._version, acting(routing))
        return self._seen[2]

    def __deepcopy__(self, memo: object) -> "Reader":
        return Reader()


def acting(routing: Routing) -> Members:
    """The components whose weight is not zero, looked for where that costs nothing or nobody vouches for it.

    Ids on the CPU that are the same for every token come from a router that knows them: with those, weights that vary
    or lie on an accelerator are not read.
    """
    weights, indices = routing.weights, routing.indices
    if indices is not None and _same_everywhere(indices):
        ids = indices[(0,) * (indices.dim() - 1)].tolist()
        vouched = indices.device.type == "cpu" and (weights.dim() > 1 or weights.device.type != "cpu")
    else:
        weights, ids, vouched = routing.dense(), range(routing.num_experts), False
    columns = [(m, weights[..., place, None]) for place, m in enumerate(ids)]
    if not vouched:
        largest = weights.detach().abs().reshape(-1, len(columns)).amax(0).tolist()
        columns = [column for column, most in zip(columns, largest) if most != 0]
    if not columns:
        raise ValueError(f"a routing among {routing.num_experts} components gives none of them any weight.")
    if len(columns) == 1 and bool((columns[0][1] == 1).all()):
        return [(columns[0][0], None)]
    return list(columns)


def alone(members: Members) -> int | None:
    """The component that acts alone at weight 1, if one does."""
    return members[0][0] if members[0][1] is None else None


def _same_everywhere(indices: Tensor) -> bool:
    return all(size == 1 or stride == 0 for size, stride in zip(indices.shape[:-1], indices.stride()))


def _gated(projector: nn.Module, x: Tensor, straight: Tensor, alpha: Tensor) -> Tensor:
    """(1 - alpha) projector(x) + alpha straight, in float32 at least, in the dtype of `straight`."""
    if isinstance(projector, nn.Identity):
        return straight
    wide = torch.promote_types(straight.dtype, torch.float32)
    weight = _beside(alpha, straight).to(wide)
    return torch.lerp(projector(x).to(wide), straight.to(wide), weight).to(straight.dtype)


def _mixed(parts: Sequence[tuple[Tensor | None, Tensor]]) -> Tensor:
    """sum_m alpha_m part_m, in float32 at least, in the dtype of the widest part."""
    dtype = parts[0][1].dtype
    for _, part in parts:
        if part.dtype != dtype:
            dtype = torch.promote_types(dtype, part.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    total: Tensor | None = None
    for alpha, part in parts:
        assert alpha is not None
        weight = _beside(alpha, part)
        if weight.dtype != wide or part.dtype != wide:
            weight, part = weight.to(wide), part.to(wide)
        total = part * weight if total is None else torch.addcmul(total, part, weight)
    assert total is not None
    return total if wide == dtype else total.to(dtype)


def _beside(alpha: Tensor, x: Tensor) -> Tensor:
    """The weights of the tokens that `x` has: the last ones, where a component kept only those for its head."""
    if alpha.dim() < 3 or alpha.shape[-2] in (1, x.shape[-2]):
        return alpha
    return alpha[..., -x.shape[-2] :, :]
