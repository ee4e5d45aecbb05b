"""The slots of a hybrid as experts: pretrained embeddings, runs of layers, and heads, of different architectures."""

from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor, nn

from mixwright.experts.base import AbstractExperts
from mixwright.experts.projectors import Projection, make_projector, resized
from mixwright.routing import Condition, Routing

Run = Callable[[int, Tensor | None], Tensor]
"""(component, hidden state or None) -> what leaves its part of this slot: `backbones.hybrid.Slot.run`."""


class EmbeddingExperts(AbstractExperts):
    """h_0 = sum_m alpha_m pad(E_m[x]): each component's own embedding, with all that comes before its first layer."""

    def __init__(self, run: Run, widths: Sequence[int]) -> None:
        super().__init__()
        self.run, self.num_experts, self.width = run, len(widths), max(widths)

    def forward(self, x: Tensor, routing: Routing, condition: Condition) -> Float[Tensor, "batch seq width"]:
        """The mixed stream; `x` is not read: components embed the pass's own tokens."""
        del x, condition
        return _mix(routing, [(m, a, resized(self.run(m, None), self.width)) for m, a in _live(routing)])


class BlockExperts(AbstractExperts):
    """One block of a hybrid: h <- sum_m alpha_m z_m, with the gated residual projectors of Manticore.

    x_m = (1 - alpha_m) Win_m(h) + alpha_m trunc_m(h); y_m = layers_m(x_m); z_m = (1 - alpha_m) Wout_m(y_m) + alpha_m
    pad(y_m). A component that acts alone, at weight 1, meets no projector and no arithmetic.
    """

    def __init__(self, run: Run, widths: Sequence[int], projectors: Projection = "linear") -> None:
        super().__init__()
        self.run, self.num_experts, self.widths, self.width = run, len(widths), tuple(widths), max(widths)
        self.enter = nn.ModuleList(make_projector(projectors, self.width, d) or nn.Identity() for d in widths)
        self.leave = nn.ModuleList(make_projector(projectors, d, self.width) or nn.Identity() for d in widths)

    def forward(
        self, x: Float[Tensor, "batch seq width"], routing: Routing, condition: Condition
    ) -> Float[Tensor, "batch seq width"]:
        """The stream after this block."""
        del condition
        return _mix(routing, [(m, a, self._through(m, a, x)) for m, a in _live(routing)])

    def _through(self, m: int, alpha: Tensor | None, x: Tensor) -> Tensor:
        straight = resized(x, self.widths[m])
        if alpha is None:
            return resized(self.run(m, straight), self.width)
        enter, leave = self.enter[m], self.leave[m]
        if isinstance(enter, nn.Identity):
            return resized(self.run(m, straight), self.width)
        y = self.run(m, (1 - alpha) * enter(x) + alpha * straight)
        return (1 - alpha) * leave(y) + alpha * resized(y, self.width)


class HeadExperts(AbstractExperts):
    """logits = sum_m alpha_m H_m(trunc_m(h)), with each component's own post-processing."""

    def __init__(self, run: Run, widths: Sequence[int]) -> None:
        super().__init__()
        self.run, self.num_experts, self.widths = run, len(widths), tuple(widths)

    def forward(
        self, x: Float[Tensor, "batch seq width"], routing: Routing, condition: Condition
    ) -> Float[Tensor, "batch seq vocab"]:
        """The mixed logits."""
        del condition
        return _mix(routing, [(m, a, self.run(m, resized(x, self.widths[m]))) for m, a in _live(routing)])


def _live(routing: Routing) -> list[tuple[int, Tensor | None]]:
    """The components that act, with their weights; None for one that acts alone at weight 1."""
    members = range(routing.num_experts) if routing.indices is None else routing.indices.tolist()
    if len(members) == 1:
        return [(members[0], None)]
    return [(m, routing.weights[..., place, None]) for place, m in enumerate(members)]


def _mix(routing: Routing, parts: list[tuple[int, Tensor | None, Tensor]]) -> Tensor:
    if len(parts) == 1 and parts[0][1] is None:
        return parts[0][2]
    mixed: Tensor | None = None
    for _, alpha, part in parts:
        assert alpha is not None
        term = alpha.to(part.dtype) * part
        mixed = term if mixed is None else mixed + term
    assert mixed is not None
    return mixed
