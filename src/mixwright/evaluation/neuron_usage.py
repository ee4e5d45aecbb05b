"""Which neurons are used, how much and how evenly: counted while a model runs, by looking at what was retrieved only.

A pass adds to the rows and sub-keys that it touched; nothing goes over the whole table until somebody asks for numbers.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mixwright.evaluation.neuron_sites import neuron_sites, plain_router
from mixwright.ops.spread import gini, unevenness
from mixwright.routers.retriever import AbstractRetriever, Retrieval


@dataclass(frozen=True, kw_only=True)
class AxisUsage:
    """The sub-keys of one axis: `counts` `(heads, sub-keys)`, and of each head unevenness (nats), Gini, dead share."""

    counts: Int[Tensor, "heads keys"]
    unevenness: Float[Tensor, " heads"]
    gini: Float[Tensor, " heads"]
    dead: Float[Tensor, " heads"]


@dataclass(frozen=True, kw_only=True)
class SiteUsage:
    """One site. `counts`, `mass`: retrievals and gate mass of each row. `used`: the share of rows with any mass.

    `unevenness` is of the mass, in nats, as the paper's; `gini` of the counts. `coverage` `(heads,)` and `flagged`
    `(heads,)` are means over tokens, None where they were not measured, or nothing flags. `leaning`: the mean weight of
    the dense branch. `tokens`: real ones.
    """

    tokens: int
    counts: Int[Tensor, " rows"]
    mass: Float[Tensor, " rows"]
    used: float
    unevenness: float
    gini: float
    first: AxisUsage
    second: AxisUsage
    coverage: Float[Tensor, " heads"] | None
    flagged: Float[Tensor, " heads"] | None
    leaning: float | None

    @property
    def dead(self) -> Int[Tensor, " dead"]:
        """Ids of the rows that were never retrieved."""
        return (self.counts == 0).nonzero().flatten()


class SiteMeter(nn.Module):
    """Counts the retrievals of one router; its buffers are all that it knows, and are saved with it."""

    def __init__(self, router: AbstractRetriever, *, detail: bool = True) -> None:
        super().__init__()
        self.detail = detail
        (n1, n2), heads = router.grid, router.heads
        self.grid = router.grid
        device = next(router.parameters()).device
        rows = plain_router(router).num_experts
        shapes = {"rows": (rows,), "first": (heads, n1), "second": (heads, n2), "tokens": (), "measured": ()}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int64, device=device))
        for name, shape in {"mass": (rows,), "covered": (heads,), "flags": (heads,), "lean": ()}.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64, device=device))
        self.register_buffer("flagging", torch.zeros((), dtype=torch.bool, device=device))
        self.rows: Tensor
        self.first: Tensor
        self.second: Tensor
        self.tokens: Tensor
        self.measured: Tensor
        self.mass: Tensor
        self.covered: Tensor
        self.flags: Tensor
        self.lean: Tensor
        self.flagging: Tensor

    @torch.no_grad()
    def forward(self, found: Retrieval, counted: Bool[Tensor, "*batch"] | None) -> None:
        """Add one pass: every retrieval of a real token whose gate is not zero."""
        gates, indices = found.gates.detach(), found.indices
        acts = gates != 0
        if counted is not None:
            acts = acts & counted[..., None, None]
        ids, head = indices[acts], acts.nonzero()[:, -2]
        one = torch.ones_like(ids)
        (n1, n2) = self.grid
        self.rows.index_add_(0, ids, one)
        place = ids % (n1 * n2)  # heads with experts of their own have ids of their own
        self.first.view(-1).index_add_(0, head * n1 + place // n2, one)
        self.second.view(-1).index_add_(0, head * n2 + place % n2, one)
        self.mass.index_add_(0, ids, gates[acts].double())
        real = counted.sum() if counted is not None else gates[..., 0, 0].numel()
        self.tokens += real
        if found.coverage is not None:
            self.measured += real
            self.covered += _sum(found.coverage, counted)
        if found.flagged is not None:
            self.flagging.fill_(True)
            self.flags += _sum(found.flagged, counted)
        if found.dense is not None:
            self.lean += (found.dense if counted is None else found.dense * counted).double().sum()

    def usage(self) -> SiteUsage:
        """The numbers so far."""
        tokens, measured = int(self.tokens), int(self.measured)
        return SiteUsage(
            tokens=tokens,
            counts=self.rows.clone(),
            mass=self.mass.clone(),
            used=float((self.mass != 0).double().mean()),
            unevenness=float(unevenness(self.mass)),
            gini=float(gini(self.rows)),
            first=_axis(self.first),
            second=_axis(self.second),
            coverage=self.covered / measured if measured else None,
            flagged=self.flags / max(1, tokens) if bool(self.flagging) else None,
            leaning=float(self.lean) / max(1, tokens) if bool(self.flagging) else None,
        )

    def clear(self) -> None:
        """Nothing seen yet."""
        for buffer in self.buffers():
            buffer.zero_()

    def add_processes(self) -> None:
        """Let every process have the sum over all of them; to be called once, at the end, by each."""
        for buffer in self.buffers():
            whole = buffer.long() if buffer.dtype == torch.bool else buffer
            dist.all_reduce(whole)
            buffer.copy_(whole)


class UsageMeter(nn.Module):
    """The meters of all sites of a model, attached until `detach`."""

    def __init__(self, model: nn.Module, *, detail: bool = True) -> None:
        super().__init__()
        self._sites = neuron_sites(model)
        self.names = tuple(self._sites)
        self._by_site = {name: SiteMeter(site.router, detail=detail) for name, site in self._sites.items()}
        self.meters = nn.ModuleList(self._by_site.values())
        for name, site in self._sites.items():
            site.router.observers.append(self._by_site[name])

    def __getitem__(self, site: str) -> SiteUsage:
        """The numbers of one site so far."""
        return self.meter(site).usage()

    def meter(self, site: str) -> SiteMeter:
        """The counts themselves. Raises ValueError for a site that is none."""
        if site not in self.names:
            raise ValueError(f"no site {site!r}; there are {', '.join(self.names)}.")
        return self._by_site[site]

    def usage(self) -> Mapping[str, SiteUsage]:
        """Site -> the numbers so far."""
        return {name: self[name] for name in self.names}

    def clear(self) -> None:
        """Nothing seen yet, at any site."""
        for meter in self._by_site.values():
            meter.clear()

    def add_processes(self) -> None:
        """Sum over processes, at every site; see `SiteMeter.add_processes`."""
        for meter in self._by_site.values():
            meter.add_processes()

    def detach(self) -> None:
        """Stop counting; what was counted stays."""
        for name, site in self._sites.items():
            own = self._by_site[name]
            site.router.observers = [other for other in site.router.observers if other is not own]


@contextmanager
def usage(model: nn.Module, *, detail: bool = True) -> Generator[UsageMeter]:
    """Inside the block every pass of `model` is counted. `detail` measures coverage too, which needs more top-k."""
    meter = UsageMeter(model, detail=detail)
    try:
        yield meter
    finally:
        meter.detach()


def _axis(counts: Int[Tensor, "heads keys"]) -> AxisUsage:
    return AxisUsage(
        counts=counts.clone(),
        unevenness=unevenness(counts),
        gini=gini(counts),
        dead=(counts == 0).double().mean(-1),
    )


def _sum(values: Tensor, counted: Tensor | None) -> Tensor:
    """Over the real tokens, for each head."""
    kept = values.double() if counted is None else values.double() * counted[..., None]
    return kept.flatten(0, -2).sum(0)
