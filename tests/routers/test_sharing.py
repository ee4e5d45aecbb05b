"""Consensus, pooling and prior against loops that follow the words: site by site, token by token, number by number."""

import math

import pytest
import torch
from torch import Tensor

from mixwright.ops.scan import decayed_sum, decayed_sum_reference
from mixwright.routers.gate import PrototypeScores
from mixwright.routers.token import TokenRouter, choose
from mixwright.routing import Condition, Routing, RoutingMemory

E, D, SITES = 4, 10, 4
MASKS = {
    "none": None,
    "left": [[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]],
    "holes": [[0, 1, 0, 1, 1, 0, 1], [1, 1, 0, 0, 1, 1, 1]],
}
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def inputs(seq: int = 7) -> Tensor:
    """Activations of every site, (sites, batch, seq, d_in)."""
    return 2 * torch.randn(SITES, 2, seq, D, generator=torch.Generator().manual_seed(0))


def prototypes() -> Tensor:
    return torch.randn(SITES, E, D, generator=torch.Generator().manual_seed(1))


ALLOWED = torch.ones(SITES, E, dtype=torch.bool)
ALLOWED[0, 1] = ALLOWED[1, 1] = ALLOWED[1, 3] = False


def routers(stream: str = "decoder", **options: float) -> list[TokenRouter]:
    return [
        TokenRouter(PrototypeScores(prototypes()[j]), 2, allowed=ALLOWED[j], stream=stream, order=j, **options)  # type: ignore[arg-type]
        for j in range(SITES)
    ]


def by_router(x: Tensor, mask: Tensor | None, stream: str = "decoder", **options: float) -> list[Routing]:
    condition = Condition(token_mask=mask, encoder_mask=mask, memory=RoutingMemory(rows=2))
    return [router(x[j], condition) for j, router in enumerate(routers(stream, **options))]


def by_hand(
    x: Tensor, mask: Tensor | None, stream: str, *, pooling: float = 0, consensus: float = 0, prior: float = 0
) -> list[Tensor]:
    """The definition, in float64, for one sequence at a time; returns the final logits of every site."""
    batch, seq = x.shape[1:3]
    real = torch.ones(batch, seq) if mask is None else mask
    out = [torch.zeros(batch, seq, E, dtype=torch.float64) for _ in range(SITES)]
    for b in range(batch):
        received: list[list[list[float]]] = [[] for _ in range(seq)]  # token -> site -> probabilities
        for j in range(SITES):
            raw = PrototypeScores(prototypes()[j].double())(x[j, b].double())
            at_site: list[Tensor] = []
            views = [view(received[t], j) for t in range(seq)]
            for t in range(seq):
                logits = raw[t].clone()
                others = [u for u in range(seq) if real[b, u] and (stream != "decoder" or u <= t)]
                if pooling and others:
                    steps = [
                        sum(1 for w in range(min(u, t) + (u < t), max(u, t) + (u < t)) if real[b, w]) for u in others
                    ]
                    weights = [pooling**step for step in steps]
                    logits = sum(w * raw[u] for w, u in zip(weights, others, strict=True)) / sum(weights)
                if consensus and j:
                    logits = logits + consensus * torch.tensor([math.log(p) for p in views[t]])
                seen = [u for u in range(seq) if real[b, u] and (stream != "decoder" or u < t)]
                if prior and j and seen:
                    logits = logits + prior * torch.tensor([views[u] for u in seen]).double().mean(0).log()
                at_site.append(logits.masked_fill(~ALLOWED[j], -math.inf))
            for t in range(seq):
                received[t].append(torch.softmax(at_site[t], -1).tolist())
                out[j][b, t] = at_site[t]
    return out


def view(sites: list[list[float]], j: int) -> list[float]:
    """Mean over the earlier sites at which an expert could be chosen; uniform where there was none."""
    means: list[float] = []
    for e in range(E):
        got = [sites[i][e] for i in range(j) if ALLOWED[i, e]]
        means.append(sum(got) / len(got) if got else 1.0 / int(ALLOWED[j].sum()))
    return means


OPTIONS = [
    {"consensus": 1.5},
    {"pooling": 0.8},
    {"prior": 2.0},
    {"consensus": 3.0, "prior": 0.7},
    {"consensus": 1.0, "prior": 1.0, "pooling": 0.6},
]


@every_mask
@pytest.mark.parametrize("stream", ["decoder", "encoder"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_routing_follows_the_definition(options: dict[str, float], stream: str, mask: list[list[int]] | None) -> None:
    real = None if mask is None else torch.tensor(mask).bool()
    expected = by_hand(inputs(), real, stream, **options)
    for routing, logits in zip(by_router(inputs(), real, stream, **options), expected, strict=True):
        dense = choose(logits, 2).dense().float()
        counted = slice(None) if real is None else real
        torch.testing.assert_close(routing.dense()[counted], dense[counted], atol=1e-5, rtol=1e-4)
        assert routing.dense().isfinite().all()


@every_mask
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cuts", [[1] * 7, [4, 1, 1, 1], [3, 4]], ids=str)
def test_pass_by_pass_equals_one_pass(cuts: list[int], options: dict[str, float], mask: list[list[int]] | None) -> None:
    real = None if mask is None else torch.tensor(mask).bool()
    whole = by_router(inputs(), real, **options)
    memory, sites, parts = RoutingMemory(), routers(**options), [[] for _ in range(SITES)]  # type: ignore[var-annotated]
    for piece in torch.arange(7).split(cuts):
        memory.begin_pass(2)
        seen = None if real is None else real[:, : int(piece[-1]) + 1]
        for j, router in enumerate(sites):
            parts[j].append(router(inputs()[j][:, piece], Condition(token_mask=seen, memory=memory)).dense())
        memory.end_pass()
    for routing, pieces in zip(whole, parts, strict=True):
        torch.testing.assert_close(torch.cat(pieces, 1), routing.dense(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stream", ["decoder", "encoder"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str, stream: str) -> None:
    options = {"consensus": 1.0, "prior": 1.0, "pooling": 0.6}
    x = inputs()
    where = slice(3, None) if side == "left" else slice(0, 7)
    junk = 1e3 * torch.ones(SITES, 2, 3, D)
    padded = torch.cat([junk, x], 2) if side == "left" else torch.cat([x, junk], 2)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[:, :3] = side != "left"
    mask[:, 7:] = side != "right"
    for alone, routing in zip(
        by_router(x, None, stream, **options), by_router(padded, mask, stream, **options), strict=True
    ):
        torch.testing.assert_close(routing.dense()[:, where], alone.dense(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_decoder_never_sees_later_tokens(options: dict[str, float]) -> None:
    x, changed = inputs(), inputs()
    changed[:, :, 5:] = 0.0
    for before, after in zip(by_router(x, None, **options), by_router(changed, None, **options), strict=True):
        assert torch.equal(before.dense()[:, :5], after.dense()[:, :5])


def test_all_off_is_the_paper_bit_for_bit() -> None:
    x = inputs()
    for j, routing in enumerate(by_router(x, None, pooling=0.0, consensus=0.0, prior=0.0)):
        scores = PrototypeScores(prototypes()[j])(x[j]).masked_fill(~ALLOWED[j], -torch.inf)
        values, indices = scores.topk(2)
        assert torch.equal(routing.weights, torch.softmax(values, -1))
        assert routing.indices is not None
        assert torch.equal(routing.indices, indices)


def test_the_first_site_is_the_papers_with_consensus_on() -> None:
    plain, shared = by_router(inputs(), None), by_router(inputs(), None, consensus=3.0, prior=2.0)
    assert torch.equal(plain[0].weights, shared[0].weights)
    assert not torch.equal(plain[1].weights, shared[1].weights)


def test_large_beta_settles_on_one_expert() -> None:
    open_sites = [TokenRouter(PrototypeScores(prototypes()[j]), 1, consensus=50.0, order=j) for j in range(SITES)]
    memory = RoutingMemory()
    leaders = [router(inputs()[j], Condition(memory=memory)).leader() for j, router in enumerate(open_sites)]
    assert all(torch.equal(leader, leaders[0]) for leader in leaders[1:])


def test_a_decoder_hears_of_the_source_from_earlier_cross_sites_in_every_pass() -> None:
    x, source, gamma = inputs(3), inputs(5), 1.5
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    options = {"prior": gamma, "consensus": 0.5}
    streams = ["decoder", "cross", "decoder", "cross"]
    sites = [
        TokenRouter(PrototypeScores(prototypes()[j]), 2, stream=stream, order=j, **options)  # type: ignore[arg-type]
        for j, stream in enumerate(streams)
    ]

    def run(memory: RoutingMemory, tokens: slice, first: bool) -> list[Tensor]:
        memory.begin_pass(2)
        condition = Condition(encoder_mask=mask, memory=memory)
        out = []
        for j, router in enumerate(sites):
            if streams[j] == "decoder":
                out.append(router(x[j][:, tokens], condition).dense())
            elif first:  # cached keys and values: these sites run once
                router(source[j], condition)
        return out

    whole = run(RoutingMemory(), slice(0, 3), True)
    memory = RoutingMemory()
    steps = [run(memory, slice(t, t + 1), t == 0) for t in range(3)]
    for site in range(2):
        torch.testing.assert_close(torch.cat([step[site] for step in steps], 1), whole[site], atol=1e-6, rtol=1e-5)

    heard = torch.softmax(PrototypeScores(prototypes()[1])(source[1]), -1)
    own = torch.softmax(PrototypeScores(prototypes()[0])(x[0]), -1)
    for b in range(2):
        for t in range(3):
            seen = torch.cat([heard[b][mask[b]], own[b, :t]]).mean(0)
            logits = PrototypeScores(prototypes()[2])(x[2, b, t]) + 0.5 * own[b, t].log() + gamma * seen.log()
            torch.testing.assert_close(whole[1][b, t], choose(logits, 2).dense(), atol=1e-5, rtol=1e-4)


def test_memory_moves_with_the_rows() -> None:
    options = {"prior": 1.0, "pooling": 0.6, "consensus": 1.0}
    memory, sites = RoutingMemory(), routers(**options)

    def step(tokens: Tensor, rows: int) -> Tensor:
        memory.begin_pass(rows)
        return torch.stack([router(tokens[j], Condition(memory=memory)).dense() for j, router in enumerate(sites)])

    x = inputs()
    step(x[:, :, :4], 2)
    memory.repeat(2)
    memory.select(torch.tensor([3, 0, 2]))
    after = step(x[:, [1, 0, 1], 4:], 3)
    whole = torch.stack([routing.dense() for routing in by_router(x, None, **options)])
    torch.testing.assert_close(after, whole[:, [1, 0, 1], 4:], atol=1e-5, rtol=1e-5)


def test_tokens_are_taken_back() -> None:
    options = {"prior": 1.0, "pooling": 0.6, "consensus": 1.0}
    memory, sites, x = RoutingMemory(), routers(**options), inputs()

    def step(tokens: Tensor) -> Tensor:
        memory.begin_pass(2)
        return torch.stack([router(tokens[j], Condition(memory=memory)).dense() for j, router in enumerate(sites)])

    step(x[:, :, :3])
    step(torch.cat([x[:, :, 3:4], 9 + x[:, :, :3]], 2))
    memory.crop(3)
    memory.crop(0)
    after = step(x[:, :, 4:])
    whole = torch.stack([routing.dense() for routing in by_router(x, None, **options)])
    torch.testing.assert_close(after, whole[:, :, 4:], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="cropped by 4 tokens"):
        memory.crop(4)
    step(torch.zeros(SITES, 2, 100, D))
    memory.crop(32)
    with pytest.raises(ValueError, match="cropped by 1 tokens"):
        memory.crop(1)


def test_a_long_prompt_is_not_kept_alive() -> None:
    memory = RoutingMemory(rows=1)
    TokenRouter(PrototypeScores(prototypes()[0]), 2, pooling=0.5)(torch.zeros(1, 500, D), Condition(memory=memory))
    assert all(state.untyped_storage().nbytes() < 100 * (E + 1) * 4 for state in memory.tokens.values())


def test_a_module_that_runs_twice_in_a_pass_keeps_two_states() -> None:
    router = TokenRouter(PrototypeScores(prototypes()[0]), 2, pooling=0.7, order=0)
    x = inputs()
    memory = RoutingMemory()
    memory.begin_pass(2)
    whole = [router(x[j], Condition(memory=memory)).dense() for j in range(2)]
    memory, parts = RoutingMemory(), [[], []]  # type: ignore[var-annotated]
    for t in range(7):
        memory.begin_pass(2)
        for j in range(2):
            parts[j].append(router(x[j][:, t : t + 1], Condition(memory=memory)).dense())
    for j in range(2):
        torch.testing.assert_close(torch.cat(parts[j], 1), whole[j], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seq", [0, 1, 2, 3, 31, 64, 100])
def test_scan_equals_the_loop(seq: int) -> None:
    generator = torch.Generator().manual_seed(seq)
    values = torch.randn(2, seq, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    keep = torch.rand(2, seq, dtype=torch.float64, generator=generator)
    fast = decayed_sum(values, keep)
    if not seq:
        assert fast.shape == (2, 0, 3)
        return
    slow = decayed_sum_reference(values, keep)
    torch.testing.assert_close(fast, slow)
    weight = torch.randn(fast.shape, dtype=torch.float64, generator=generator)
    (grad,) = torch.autograd.grad((fast * weight).sum(), values)
    (expected,) = torch.autograd.grad((slow * weight).sum(), values)
    torch.testing.assert_close(grad, expected)
