"""New lives for sub-keys that nobody uses: pointed at queries that are poorly covered, with rows that start empty.

A value row of zero alone is not neutral under softmax: the neuron says nothing, but it takes a slot and mass from
others. So a revived sub-key stays out of every choice, by a selection bias of -inf, until it is admitted step by step.
Whatever did not retrieve the sub-key before, which on the data that it was found dead on is every token, comes out the
same to the last bit; a row that any site still reads keeps its content.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mixwright.backbones.eval_mode import eval_mode
from mixwright.evaluation.neuron_sites import NeuronSite, neuron_sites, neurons_of, plain_router, real_tokens
from mixwright.evaluation.neuron_usage import SiteUsage
from mixwright.experts.table import NeuronTable
from mixwright.ops.k_means import k_means
from mixwright.routers.product_key import ProductKeyRouter
from mixwright.routing import Condition

POOL = 8192
"""Tokens that are looked at, at most."""


@dataclass(frozen=True, kw_only=True)
class RevivedKeys:
    """Sub-keys of one axis of one site that were given a new direction: `keys` `(revived, 2)` are (key head, sub-key).

    `depth`: a selection bias low enough that none of them is chosen, from which admission starts.
    """

    site: str
    axis: str
    keys: Int[Tensor, "revived 2"]
    depth: float


@dataclass(frozen=True, kw_only=True)
class Revived:
    """What was revived. `rows`: site -> ids of rows with new content."""

    keys: list[RevivedKeys] = field(default_factory=list[RevivedKeys])
    rows: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def count(self) -> int:
        """Sub-keys, over sites and axes."""
        return sum(len(one.keys) for one in self.keys)


@torch.no_grad()
def revive(
    model: nn.Module,
    data: Iterable[Any],
    used: Mapping[str, SiteUsage],
    *,
    losses: Sequence[Tensor] | None = None,
    share: float = 0.25,
    seed: int = 0,
) -> Revived:
    """Re-seed the dead sub-keys of every site of `model`, and the rows below them that no site reads.

    `data`: inputs, or mappings of keyword arguments; `used`: what a usage meter counted on a stream that stands for
    all that matters. Directions come from the queries of the `share` of tokens with the lowest coverage, by k-means;
    rows in from the inputs of the tokens with the highest `losses` `(*batch)`, one tensor for each of `data`, or
    without losses from those with the lowest coverage. What a site sees beyond 8192 tokens
    is not looked at; the last open sub-key of the first axis stays as it is.
    """
    sites = neuron_sites(model)
    pools = _pools(model, sites, data, losses)
    revived = Revived()
    busy = _busy(sites, used)
    for name, site in sites.items():
        router, pool = plain_router(site.router), pools[name]
        touched: list[Tensor] = []
        for axis, place in (("first", 0), ("second", 1)):
            keys, bias = (router.get_parameter(f"keys_{axis}"), router.get_buffer(f"bias_{axis}"))
            dead = _dead(getattr(used[name], axis).counts, bias)
            if axis == "first":  # kept out behind the last open one they would be scored apart, and round otherwise
                dead = dead[dead[:, 1] != int((bias != -torch.inf).any(0).nonzero()[-1])]
            if not len(dead):
                continue
            found = _reseed(keys, bias, dead, pool, place, share, seed)
            revived.keys.append(RevivedKeys(site=name, axis=axis, keys=found, depth=pool.spread[place]))
            touched.append(_rows_below(router, axis, found))
        if touched:
            ids = torch.cat(touched).unique()
            ids = ids[~busy[id(neurons_of(site.experts).table)][ids]]
            revived.rows[name] = _refill(site, ids, pool, seed)
    return revived


class Admission:
    """Lets revived sub-keys in over `steps` steps: their selection bias rises from where none is chosen to 0."""

    def __init__(self, model: nn.Module, revived: Revived, steps: int) -> None:
        if steps < 1:
            raise ValueError(f"steps={steps}: expected at least 1 step until all are admitted.")
        self.steps, self.done = steps, 0
        self._biases = [
            (plain_router(neuron_sites(model)[one.site].router).get_buffer(f"bias_{one.axis}"), one)
            for one in revived.keys
        ]

    @torch.no_grad()
    def step(self) -> bool:
        """Raise the biases once; whether all are admitted. To be called after the optimiser's step."""
        self.done = min(self.done + 1, self.steps)
        for bias, one in self._biases:
            bias[one.keys[:, 0], one.keys[:, 1]] = -one.depth * (1 - self.done / self.steps)
        return self.done == self.steps


@dataclass(frozen=True, kw_only=True)
class _Pool:
    """Tokens that a site saw. `hard`: larger where the model did worse. `spread`: range of the scores of each axis."""

    inputs: Float[Tensor, "tokens d_in"]
    queries: Float[Tensor, "tokens heads 2 half"]
    coverage: Float[Tensor, "tokens heads"]
    hard: Float[Tensor, " tokens"]
    spread: tuple[float, float]


def _pools(
    model: nn.Module, sites: Mapping[str, NeuronSite], data: Iterable[Any], losses: Sequence[Tensor] | None
) -> dict[str, _Pool]:
    """What every site saw of `data`, in eval mode."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in sites}

    def keeper(name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Tensor, Condition]) -> None:
            del module
            seen[name].append(real_tokens(*args))

        return keep

    hooks = [site.router.register_forward_pre_hook(keeper(name)) for name, site in sites.items()]
    try:
        with eval_mode(model):
            for inputs in data:
                model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    with eval_mode(model):
        return {name: _pool(plain_router(sites[name].router), passes, losses) for name, passes in seen.items()}


def _pool(router: ProductKeyRouter, passes: Sequence[tuple[Tensor, Tensor]], losses: Sequence[Tensor] | None) -> _Pool:
    x, counted = (torch.cat(parts) for parts in zip(*passes, strict=True))
    inputs = x[counted][:POOL]
    queries = router.asked(inputs, Condition())
    coverage = router.find(queries, detail=True).coverage
    assert coverage is not None
    first, second = router.half_scores(inputs, Condition())
    hard = -coverage.mean(-1)
    if losses is not None:
        given = torch.cat([part.reshape(-1) for part in losses])
        if len(given) != len(x):
            raise ValueError(
                f"{len(given)} losses, but the data has {len(x)} tokens; give one loss for each token, padding too."
            )
        hard = given[counted][:POOL]
    spread = tuple(float(half.max() - half.min()) for half in (first, second))
    return _Pool(inputs=inputs, queries=queries, coverage=coverage, hard=hard, spread=spread)  # type: ignore[arg-type]


def _busy(sites: Mapping[str, NeuronSite], used: Mapping[str, SiteUsage]) -> dict[int, Tensor]:
    """Table -> rows that some site reads, or that are frozen."""
    busy: dict[int, Tensor] = {}
    for name, site in sites.items():
        table = neurons_of(site.experts).table
        rows = used[name].counts > 0
        frozen = getattr(table, "frozen", None)
        rows = rows if frozen is None else rows | frozen
        busy[id(table)] = busy.get(id(table), torch.zeros_like(rows)) | rows
    return busy


def _dead(counts: Int[Tensor, "heads keys"], bias: Float[Tensor, "key_heads keys"]) -> Int[Tensor, "dead 2"]:
    """(key head, sub-key) of those that no head of theirs used, and that are not kept out on purpose."""
    counts = counts.sum(0, keepdim=True) if len(bias) == 1 else counts
    return ((counts == 0) & (bias != -torch.inf)).nonzero()


def _reseed(
    keys: nn.Parameter, bias: Tensor, dead: Tensor, pool: _Pool, place: int, share: float, seed: int
) -> Int[Tensor, "revived 2"]:
    """Point dead sub-keys at poorly covered queries and keep them out; as many as there are queries for."""
    done: list[Tensor] = []
    for head in dead[:, 0].unique().tolist():
        chosen = dead[dead[:, 0] == head]
        whose = slice(None) if len(bias) == 1 else slice(head, head + 1)
        coverage = pool.coverage[:, whose].flatten()
        queries = pool.queries[:, whose, place].flatten(0, 1)
        poor = queries[coverage.argsort(stable=True)[: max(1, round(share * len(coverage)))]]
        chosen = chosen[: len(poor)]
        centres = k_means(poor, len(chosen), seed)
        size = keys[head].float().norm(dim=-1).mean()
        centres = centres * (size / centres.norm(dim=-1, keepdim=True).clamp_min(1e-12))
        keys.data[head, chosen[:, 1]] = centres.to(keys.dtype)
        bias[head, chosen[:, 1]] = -torch.inf
        done.append(chosen)
    return torch.cat(done)


def _rows_below(router: ProductKeyRouter, axis: str, keys: Int[Tensor, "keys 2"]) -> Int[Tensor, " rows"]:
    """Ids of all rows of some sub-keys; heads with experts of their own have ids of their own."""
    n1, n2 = router.grid
    start = keys[:, 0] * n1 * n2 if router.num_experts > n1 * n2 else torch.zeros_like(keys[:, 0])
    if axis == "first":
        rows = (start + keys[:, 1] * n2)[:, None] + torch.arange(n2, device=keys.device)
    else:
        rows = (start + keys[:, 1])[:, None] + torch.arange(n1, device=keys.device) * n2
    return rows.flatten()


def _refill(site: NeuronSite, ids: Tensor, pool: _Pool, seed: int) -> Int[Tensor, " rows"]:
    """Rows in towards inputs that the model does badly on, as long as rows in are; rows out of zero."""
    neurons = neurons_of(site.experts)
    table = neurons.table
    if not isinstance(table, NeuronTable):
        raise ValueError(f"a {type(table).__name__} can't be written to; revive neurons in a NeuronTable.")
    for read in table.before_read:
        read(ids)
    rows = table.rows.data
    if table.parts > 1 and len(ids):
        worst = pool.hard.argsort(descending=True, stable=True)[: max(1, min(len(ids), len(pool.hard) // 4))]
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed)).to(ids.device)
        inside = neurons.inward(pool.inputs[worst]).float()
        size = rows[:1024, 0].float().norm(dim=-1).mean()
        towards = inside * (size / inside.norm(dim=-1, keepdim=True).clamp_min(1e-12))
        rows[ids, :-1] = towards[order % len(worst)][:, None].to(rows.dtype)
    rows[ids, -1] = 0
    if table.bias is not None:
        table.bias.data[ids] = 0
    return ids
