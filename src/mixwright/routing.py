"""The values that travel between routers, experts, statistics and reports.

Axis words used everywhere: batch, seq, d_in, d_out, experts, k, heads, rank, order, tasks, masks, models, shots.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_KEPT = 33


@dataclass(frozen=True, slots=True)
class Routing:
    """Who acts, and how strongly: y = sum_k weights_k * f_{indices_k}(x).

    `weights`: routing weights, shape `(*decision, k)`. `indices`: expert ids of the same shape, or None when the last
    axis is all experts in order; ids that a router knows without looking may stay on the CPU. The decision axes
    broadcast against the leading axes of the input; size 1 means that the choice does not vary there, no axes at all
    mean one choice for the whole model. A weight of zero means that the expert does not act, whatever id stands beside
    it.
    """

    weights: Float[Tensor, "*decision k"]
    num_experts: int
    indices: Int[Tensor, "*decision k"] | None = None

    def dense(self) -> Float[Tensor, "*decision experts"]:
        """The same routing with one weight for every expert, `(*decision, experts)`."""
        if self.indices is None:
            return self.weights
        full = self.weights.new_zeros((*self.weights.shape[:-1], self.num_experts))
        return full.scatter_add(-1, self.indices.to(full.device), self.weights)

    def leader(self) -> Int[Tensor, "*decision"]:
        """The id of the expert with the largest weight; the earliest on a tie."""
        best = self.weights.argmax(-1, keepdim=True)
        return (best if self.indices is None else self.indices.to(best.device).gather(-1, best)).squeeze(-1)


@dataclass(frozen=True, slots=True)
class SupportSet:
    """The labelled examples of an episode: inputs `(shots, ...)`, labels `(shots,)`."""

    inputs: Any
    labels: Int[Tensor, " shots"]


@dataclass(slots=True)
class RoutingMemory:
    """What earlier sites of this pass, and earlier tokens of these sequences, decided.

    `tokens`, by site, and `sources`, by the order of cross-attention sites, last as long as their sequences: every
    tensor has the batch first, so that whatever moves the rows of a cache moves these too. Those of `tokens` have the
    last tokens' states second, the present one last, so that tokens can be taken back. `depth` lasts for one pass: per
    stream and shape of its tokens, the sum of their routing probabilities `(*batch, experts)` and the number of sites
    `(experts,)` at which each expert could be chosen. `shared` lasts for one pass as well: what one site drew or worked
    out for later ones, by name.
    `visits` counts how often a site ran in this pass. `rows` is the batch of the pass. `unseen` counts tokens of the
    cache that passed while nobody remembered. Between passes it is closed.
    """

    tokens: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    sources: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    depth: dict[tuple[str, tuple[int, ...]], tuple[Tensor, Tensor]] = field(
        default_factory=dict[tuple[str, tuple[int, ...]], tuple[Tensor, Tensor]]
    )
    shared: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    visits: dict[str, int] = field(default_factory=dict[str, int])
    rows: int | None = None
    unseen: int = 0
    is_open: bool = True

    def begin_pass(self, rows: int | None = None) -> None:
        """Forget what earlier sites decided, keep what earlier tokens did."""
        self.end_pass()
        self.rows, self.is_open = rows, True

    def end_pass(self) -> None:
        """No site runs until the next pass begins."""
        self.depth.clear()
        self.shared.clear()
        self.visits.clear()
        self.is_open = False

    def visit(self, site: str) -> str:
        """A name for this run of `site`: a module that is used twice in a pass keeps two states."""
        count = self.visits.get(site, 0)
        self.visits[site] = count + 1
        return f"{site}#{count}"

    def latest(self, name: str) -> Float[Tensor, "batch width"] | None:
        """The state under `name` after the last token so far."""
        states = self.tokens.get(name)
        return None if states is None else states[:, -1]

    def keep(self, name: str, states: Float[Tensor, "batch seq width"]) -> None:
        """Put down the states after each token of this pass; the last few are kept, and the one before the pass."""
        before = self.tokens.get(name)
        if states.shape[1] >= _KEPT:
            states = states[:, -_KEPT:].clone()  # a view would hold on to the states of a whole prompt
        elif before is not None:
            states = torch.cat([before[:, -1:], states], 1)
        self.tokens[name] = states

    def crop(self, count: int) -> None:
        """Take back the last `count` tokens. Raises ValueError beyond the last pass, or its last 32 tokens."""
        held = min((states.shape[1] for states in self.tokens.values()), default=count + 1)
        if count >= held:
            raise ValueError(
                f"the cache is cropped by {count} tokens, but what the routers remember (pooling or prior) can be "
                f"taken back by {held - 1} here: the tokens of the last pass, at most {_KEPT - 1}. Decode without an "
                "assistant model of this kind, or compose with pooling=0, prior=0."
            )
        if count:
            self.tokens = {name: states[:, :-count] for name, states in self.tokens.items()}

    def select(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep these rows of the batch, in this order: a beam search's reordering, or finished sequences leaving."""
        self._move(lambda state: state.index_select(0, rows.to(state.device)))

    def repeat(self, repeats: int) -> None:
        """Every row `repeats` times in place."""
        self._move(lambda state: state.repeat_interleave(repeats, 0))

    def forget(self) -> None:
        """As new."""
        self.end_pass()
        self.tokens.clear()
        self.sources.clear()

    def _move(self, change: Callable[[Tensor], Tensor]) -> None:
        self.tokens = {name: change(state) for name, state in self.tokens.items()}
        self.sources = {order: change(state) for order, state in self.sources.items()}


@dataclass(frozen=True, slots=True)
class Condition:
    """What the caller knows about a pass that the hidden state does not say.

    `task_ids`: `(batch,)`, or `(1,)` for a batch of one task. `task_weights`: where the task is unknown, how much each
    row resembles each task, rows summing to at most 1; what is left over resembles none. `token_mask`: `(batch, seq)`,
    true for real tokens of the main stream (the decoder's, where there is one); with a cache it begins with the tokens
    of earlier passes. `encoder_mask`: the same for an encoder's tokens; of a model with one stream, the same mask.
    `support`: an episode's support set. `memory`: earlier decisions, for routers that share them across sites or
    tokens.
    """

    task_ids: Int[Tensor, "#batch"] | None = None
    token_mask: Bool[Tensor, "batch seq"] | None = None
    encoder_mask: Bool[Tensor, "batch source"] | None = None
    support: SupportSet | None = None
    memory: RoutingMemory | None = None
    task_weights: Float[Tensor, "#batch tasks"] | None = None

    def for_batch(self, batch: int) -> "Condition":
        """The same condition for `batch` rows: beams repeat each row in place. One row holds for any batch.

        Raises ValueError when `batch` is no multiple of the rows that were given.
        """
        if self.task_ids is None and self.task_weights is None:
            return self
        return replace(
            self,
            task_ids=_repeated("task_ids", self.task_ids, batch),
            task_weights=_repeated("task_weights", self.task_weights, batch),
        )


def _repeated(name: str, rows: Tensor | None, batch: int) -> Tensor | None:
    if rows is None or len(rows) in (1, batch):
        return rows
    repeats, rest = divmod(batch, len(rows))
    if rest or repeats == 0:
        raise ValueError(
            f"condition.{name} has {len(rows)} rows but the pass has {batch}; give one for each row of the batch, or "
            "one for all."
        )
    return torch.repeat_interleave(rows, repeats, 0)
