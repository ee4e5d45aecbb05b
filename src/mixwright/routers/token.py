"""The router of token-wise methods: score all experts, keep the best k, weigh them by a softmax."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mixwright.ops.top_k import top_k
from mixwright.routers.base import AbstractRouter, AbstractScores
from mixwright.routers.consensus import (
    causal_mean,
    log_prior,
    remember,
    running_mean,
    tell_decoder,
    told_by_encoder,
    whole_mean,
)
from mixwright.routers.pooling import pool_both_ways, pool_causal
from mixwright.routers.remembered import Remembered
from mixwright.routing import Condition, Routing, RoutingMemory

STREAMS = ("decoder", "encoder", "cross")
ALONE = "alone/"


class TokenRouter(AbstractRouter):
    """w = softmax over the k largest of score_z(u) + offset_z (Muqeeth et al. 2024, section 3, eq. 6).

    `allowed` masks experts out before the choice; `offset` is added to the scores. Both have one entry for each expert
    of the pool. A token for which fewer than k experts are allowed gives the rest no weight.

    The rest is not from the paper, and with every option off the numbers are PHATGOOSE's to the last bit:

    `null_expert`: a constant score for the backbone itself, which becomes the pool's last id. It competes for the k
    places, and an expert that scores below it gets no weight: where it is best, the output is the backbone's.
    `pooling`: decay d of a running mean of the scores over real tokens. Causal in the decoder (earlier tokens only);
    in the streams that see the whole sequence, `encoder` and `cross`, it goes both ways.
    `consensus`: beta; adds beta * log(mean of the probabilities that the same token got at earlier sites of this pass
    and stream), probabilities being the softmax over the whole pool after every term here, before the choice of k.
    `prior`: gamma; adds gamma * log(mean of those means over the real tokens before this one); where a decoder has an
    encoder, its tokens come first of all, as the cross-attention's k and v sites saw them. Encoder tokens take the
    mean over their whole sequence.

    `stream` says whose tokens pass here, `order` is the site's place in the order of execution, its own number within
    the model. A site apart, whose input has no token axis (a pooler's), has the stream `alone/<path>` and shares
    nothing. The state is `condition.memory`; a router has none.
    """

    def __init__(
        self,
        scores: AbstractScores,
        top_k: int,
        *,
        allowed: Bool[Tensor, " experts"] | None = None,
        offset: Float[Tensor, " experts"] | None = None,
        null_expert: float | None = None,
        pooling: float = 0.0,
        consensus: float = 0.0,
        prior: float = 0.0,
        stream: str = "decoder",
        order: int = 0,
    ) -> None:
        super().__init__()
        self.num_experts = scores.num_experts + (null_expert is not None)
        if not 1 <= top_k <= self.num_experts:
            raise ValueError(
                f"top_k={top_k}, but the pool has {self.num_experts} experts; choose 1 <= top_k <= {self.num_experts}."
            )
        if not 0.0 <= pooling < 1.0:
            raise ValueError(f"pooling={pooling}; accepted is a decay from 0 (each token alone) to below 1.")
        if consensus < 0.0 or prior < 0.0:
            raise ValueError(f"consensus={consensus}, prior={prior}; both are weights, 0 (off) or more.")
        if stream not in STREAMS and not stream.startswith(ALONE):
            raise ValueError(
                f"stream={stream!r}; accepted are {', '.join(STREAMS)}, and {ALONE}<path> for a site apart."
            )
        self.scores = scores
        self.top_k = top_k
        self.null_expert = null_expert
        self.pooling = pooling
        self.consensus = consensus
        self.prior = prior
        self.stream = stream
        self.order = order
        self.register_buffer(
            "allowed", self._for_pool("allowed", allowed, torch.ones(self.num_experts, dtype=torch.bool))
        )
        self.register_buffer(
            "offset", None if offset is None else self._for_pool("offset", offset, torch.zeros(self.num_experts))
        )
        self.allowed: Tensor
        self._everyone = Remembered(_all_true)
        self.offset: Tensor | None

    def forward(self, x: Float[Tensor, "*batch d_in"], condition: Condition) -> Routing:
        """The k best experts of every token, best first."""
        scores = self.scores(x)
        alone = self.stream.startswith(ALONE)
        if self.pooling > 0.0 and not alone:
            scores = self._pooled(scores, condition)
        if self.null_expert is not None:
            scores = torch.cat([scores, torch.full_like(scores[..., :1], self.null_expert)], -1)
        if self.offset is not None:
            scores = scores + self.offset
        if self._only_the_paper():
            return choose_among_all(scores, self.top_k)
        logits = scores.masked_fill(~self.allowed, -torch.inf)
        if (self.consensus > 0.0 or self.prior > 0.0) and not alone:
            logits = self._agreed(logits, condition)
        return choose(logits, self.top_k, None if self.null_expert is None else self.num_experts - 1)

    def _only_the_paper(self) -> bool:
        """Whether every expert may be chosen and nothing is shared, so that no score is -inf."""
        if self.consensus > 0.0 or self.prior > 0.0 or self.null_expert is not None or torch.compiler.is_compiling():
            return False
        return bool(self._everyone(self.allowed, dtype=torch.bool))

    def _pooled(self, scores: Tensor, condition: Condition) -> Tensor:
        memory = self._memory(condition)
        rows = _by_sequence(scores, memory)
        real = self._real(rows, condition)
        if self.stream == "decoder":
            pooled = pool_causal(memory, memory.visit(f"pool{self.order}"), rows, real, self.pooling)
        else:
            pooled = pool_both_ways(rows, real, self.pooling)
        return pooled.reshape(scores.shape)

    def _agreed(self, logits: Tensor, condition: Condition) -> Tensor:
        memory = self._memory(condition)
        shape = tuple(logits.shape[:-1])
        view = running_mean(memory, self.stream, shape, self.allowed)
        if view is not None:
            if self.consensus > 0.0:
                logits = logits + self.consensus * log_prior(view)
            if self.prior > 0.0:
                logits = logits + self.prior * self._sequence_prior(view, memory, condition)
        remember(memory, self.stream, logits, self.allowed)
        if self.prior > 0.0 and self.stream == "cross":
            view = running_mean(memory, self.stream, shape, self.allowed)
            assert view is not None
            rows = _by_sequence(view, memory)
            tell_decoder(memory, self.order, rows, self._real(rows, condition))
        return logits

    def _sequence_prior(self, view: Tensor, memory: RoutingMemory, condition: Condition) -> Tensor:
        rows = _by_sequence(view, memory)
        real = self._real(rows, condition)
        if self.stream != "decoder":
            return log_prior(whole_mean(rows, real)).expand(rows.shape).reshape(view.shape)
        source = told_by_encoder(memory, self.order)
        mean, known = causal_mean(memory, memory.visit(f"prior{self.order}"), rows, real, source)
        return torch.where(known, log_prior(mean), 0.0).reshape(view.shape)

    def _memory(self, condition: Condition) -> RoutingMemory:
        if condition.memory is None or not condition.memory.is_open:
            raise ValueError(
                f"the router at {self.stream} site {self.order} shares decisions (consensus={self.consensus}, "
                f"pooling={self.pooling}, prior={self.prior}) and needs the memory of a running pass: call the "
                "composed model, not a layer of it, or give Condition(memory=RoutingMemory()). Activation "
                "checkpointing runs layers again outside of the pass; switch it off, or these options."
            )
        if condition.memory.unseen and (self.pooling > 0.0 or self.prior > 0.0):
            raise ValueError(
                f"the cache holds {condition.memory.unseen} tokens of which the router at {self.stream} site "
                f"{self.order} knows nothing, and with pooling={self.pooling}, prior={self.prior} it needs to. Give "
                "the cache that an earlier pass of this model returned, made under the same router, or none."
            )
        return condition.memory

    def _real(self, rows: Tensor, condition: Condition) -> Tensor:
        """1 for real tokens, 0 for padding, `(batch, seq)`: a mask's last columns, as it may begin with a cache's."""
        mask = condition.token_mask if self.stream == "decoder" else condition.encoder_mask
        batch, seq = rows.shape[:2]
        if mask is None or mask.shape[1] < seq:
            return rows.new_ones((batch, seq))
        return mask[:, mask.shape[1] - seq :].to(rows.dtype).expand(batch, seq)

    def _for_pool(self, name: str, given: Tensor | None, neutral: Tensor) -> Tensor:
        if given is None:
            return neutral
        if len(given) not in (self.scores.num_experts, self.num_experts):
            raise ValueError(
                f"{name} has {len(given)} entries for a pool of {self.num_experts} experts; give one for each."
            )
        return torch.cat([given.to(neutral.dtype), neutral[len(given) :].to(given.device)])


def _all_true(mask: Tensor) -> Tensor:
    return mask.all().cpu()


def _by_sequence(rows: Tensor, memory: RoutingMemory) -> Tensor:
    """`(batch, seq, experts)`, whatever axes a layer had: some models flatten batch and seq, some have no seq."""
    if rows.dim() == 3:
        return rows
    batch = memory.rows or rows.shape[0]
    return rows.reshape(batch, -1, rows.shape[-1])


def choose_among_all(scores: Float[Tensor, "*batch experts"], k: int) -> Routing:
    """Softmax over the `k` largest scores, of which none is -inf: what `choose` gives, in fewer operations."""
    values, indices = top_k(scores, k)
    return Routing(torch.softmax(values, -1), scores.shape[-1], indices)


def choose(scores: Float[Tensor, "*batch experts"], k: int, null_expert: int | None = None) -> Routing:
    """Softmax over the `k` largest scores; a score of -inf gets weight zero, and the id of the winner.

    So does an expert that ranks below `null_expert`, the id of the backbone itself.
    """
    values, indices = top_k(scores, k)
    if null_expert is not None:
        is_null = (indices == null_expert).int()
        values = values.masked_fill(is_null.cumsum(-1) - is_null > 0, -torch.inf)
    possible = values > -torch.inf
    # a token with nobody to choose from would give NaN, which no mask takes out of a gradient
    values = values.masked_fill(~possible[..., :1], 0.0)
    weights = torch.where(possible, torch.softmax(values, -1), 0.0)
    return Routing(weights, scores.shape[-1], torch.where(possible, indices, indices[..., :1]))
