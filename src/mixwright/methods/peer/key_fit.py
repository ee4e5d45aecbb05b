"""Keys that find what an oracle would: the neurons of a layer that move its output most.

The oracle knows every neuron's activation, which is what retrieval is to save. Queries and sub-keys learn its choice
from the inputs that the layer met on calibration text; nothing else changes.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from mixwright.methods.peer.neurons import Neurons
from mixwright.routers.product_key import ProductKeyRouter
from mixwright.routing import Condition

_TOKENS = 512
_CHUNK = 2048


@dataclass(frozen=True)
class Found:
    """How well retrieval does what the oracle would, over some tokens, with `active` neurons each.

    `recall`: the share of the oracle's neurons that were retrieved. `mass`: the share of all importance |act| |v| that
    was. `error`: |f(x) - y|^2 / |f(x)|^2 without the layer's output bias, and `oracle_error` the same of the oracle.
    """

    active: int
    recall: float
    mass: float
    error: float
    oracle_error: float


def oracle(neurons: Neurons, x: Float[Tensor, "tokens width"], active: int) -> Int[Tensor, "tokens active"]:
    """The neurons with the largest |act| |v|, for each token."""
    return neurons.importance(x).topk(active, -1).indices


@torch.no_grad()
def start_keys(router: ProductKeyRouter, neurons: Neurons) -> None:
    """First values: a neuron's score is what its row in says, as far as sums over two axes of a few numbers can.

    `neurons` stand where the router finds them. Sub-keys are means of rows over an axis, in the directions that carry
    most; the last number of each half query is 1, so that the last of a sub-key is its bias.
    """
    _refuse_heads(router)
    (n1, n2), half = router.grid, router.dim_key // 2
    sizes = neurons.rows[:, -1].float().norm(dim=-1, keepdim=True)
    parts = neurons.rows.shape[1] - 1
    bias = neurons.rows.new_zeros(len(neurons)) if neurons.bias is None else neurons.bias[:, parts - 1]
    wanted = torch.cat([neurons.rows[:, parts - 1].float(), bias.float()[:, None]], 1) * sizes
    wanted = (wanted / wanted.std().clamp_min(1e-12) * wanted.shape[1] ** -0.5).view(n1, n2, -1)
    means = wanted.mean(1)
    rest = (wanted - means[:, None]).mean(0) if n1 > 1 else wanted[0]
    means = means if n1 > 1 else torch.zeros_like(means)
    weight, constant = router.queries.weight.view(2, half, -1), router.queries.bias.view(2, half)
    for axis, (keys, vectors) in enumerate(((router.keys_first, means), (router.keys_second, rest))):
        _, values, directions = torch.linalg.svd(vectors[:, :-1], full_matrices=False)
        kept = min(half - 1, len(values))
        weight[axis].zero_()
        weight[axis, :kept] = directions[:kept].to(weight)
        constant[axis].zero_()
        constant[axis, -1] = 1.0
        keys.zero_()
        keys[0, :, :kept] = (vectors[:, :-1] @ directions[:kept].T).to(keys)
        keys[0, :, -1] = vectors[:, -1].to(keys)
        spare = weight[axis, kept:-1]
        spare.normal_(std=weight.shape[-1] ** -0.5)


def fit_keys(
    router: ProductKeyRouter,
    neurons: Neurons,
    inputs: Float[Tensor, "tokens width"],
    *,
    steps: int = 400,
    learning_rate: float = 1e-2,
    seed: int = 0,
    shift: float = 0.0,
) -> list[float]:
    """Teach queries and sub-keys the oracle's choice of `router.top_k` neurons on `inputs`; returns the losses.

    Each neuron's score is the log-odds of being chosen, plus `shift`: a neuron's error counts as much as its
    importance is away from the last chosen one's. Neurons that the router passes over are not the oracle's either.
    Random choices come from `seed`.
    """
    _refuse_heads(router)
    if not len(inputs):
        raise ValueError("inputs: there are no tokens to learn from; expected some thousands.")
    learned = list(router.parameters())
    asked = [p.requires_grad for p in learned]
    optimiser = torch.optim.Adam(learned, lr=learning_rate)
    draw = torch.Generator().manual_seed(seed)
    live = None if router.ablated is None else ~router.ablated
    losses: list[float] = []
    for parameter in learned:
        parameter.requires_grad_(True)
    with torch.enable_grad():
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = learning_rate * min(1.0, (step + 1) / 20) * max(0.02, 1 - step / steps)
            chosen = torch.randint(len(inputs), (min(_TOKENS, len(inputs)),), generator=draw)
            x = inputs[chosen.to(inputs.device)]
            loss = _loss(router, neurons, x, live, shift)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
    optimiser.zero_grad()
    for parameter, before in zip(learned, asked, strict=True):
        parameter.requires_grad_(before)
    return losses


def _loss(router: ProductKeyRouter, neurons: Neurons, x: Tensor, live: Tensor | None, shift: float) -> Tensor:
    with torch.no_grad():
        importance = neurons.importance(x).float()
        if live is not None:
            importance = importance * live
        last = importance.topk(router.top_k, -1).values[:, -1:]
        wanted = ((importance >= last) & (importance > 0)).float()
        weight = (importance - last).abs() / importance.mean().clamp_min(1e-12) + 0.02
        weight = weight if live is None else weight * live
    scores = all_scores(router, x) - shift
    return functional.binary_cross_entropy_with_logits(scores, wanted, weight=weight)


def all_scores(router: ProductKeyRouter, x: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens experts"]:
    """The score of every expert: the sums that retrieval avoids."""
    first, second = router.half_scores(x, Condition())
    return (first[..., :, None] + second[..., None, :])[:, 0].flatten(1)


@torch.no_grad()
def measure(router: ProductKeyRouter, neurons: Neurons, inputs: Float[Tensor, "tokens width"]) -> Found:
    """How retrieval compares with the oracle on `inputs`, which it should not have learnt from."""
    _refuse_heads(router)
    sums = torch.zeros(6, dtype=torch.float64)
    out, active = neurons.rows[:, -1], router.top_k
    for x in inputs.split(_CHUNK):
        hidden, importance = neurons.hidden(x), neurons.importance(x)
        found = router.retrieve(x, Condition())
        active = min(found.indices.shape[-1], router.num_experts)
        best = importance.topk(active, -1).indices
        mine = torch.zeros_like(importance).scatter(-1, found.indices[:, 0], (found.gates[:, 0] > 0).to(importance))
        gates = torch.zeros_like(importance).scatter_add(-1, found.indices[:, 0], found.gates[:, 0].to(importance))
        whole, theirs = hidden @ out, torch.zeros_like(hidden).scatter(-1, best, hidden.gather(-1, best)) @ out
        gaps = ((hidden * gates) @ out - whole).square().sum(), (theirs - whole).square().sum(), whole.square().sum()
        hits = mine.gather(-1, best) * (importance.gather(-1, best) > 0)
        numbers = (hits.sum(), (importance.gather(-1, best) > 0).sum(), (mine * importance).sum() / importance.sum())
        sums += torch.stack([t.double().cpu() for t in (*numbers[:2], numbers[2] * len(x), *gaps)])
    hit, possible, mass, gap, best_gap, size = sums.tolist()
    size = max(size, 1e-30)
    return Found(active, hit / max(possible, 1.0), mass / max(len(inputs), 1), gap / size, best_gap / size)


def _refuse_heads(router: ProductKeyRouter) -> None:
    if router.heads != 1 or "bias" not in dict(router.queries.named_parameters()):
        raise ValueError(
            f"the router has {router.heads} heads; keys are fitted to a feed-forward layer with one head, since two "
            "would count a neuron twice, and with query_bias=True, since neurons have thresholds."
        )
