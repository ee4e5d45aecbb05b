"""What every router and every way of scoring promises; a new member adds one line to a table."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mixwright.routers.arrow import ArrowScores
from mixwright.routers.base import AbstractRouter, AbstractScores
from mixwright.routers.constant import ConstantRouter
from mixwright.routers.gate import PrototypeScores, SigmoidGate
from mixwright.routers.mixture_weights import MixtureWeights
from mixwright.routers.product_key import ProductKeyRouter
from mixwright.routers.routed_weights import RoutedMixtureWeights
from mixwright.routers.signature import SignatureScores
from mixwright.routers.spectral import SpectralScores
from mixwright.routers.task import TaskRouter
from mixwright.routers.token import TokenRouter, choose
from mixwright.routing import Condition, RoutingMemory

E, D = 5, 12


def factors(order: list[int] | None = None) -> list[tuple[Tensor, Tensor, float]]:
    generator = torch.Generator().manual_seed(0)
    made = [
        (torch.randn(r, D, generator=generator), torch.randn(7, r, generator=generator), 0.5 + r)
        for r in (2, 3, 4, 3, 2)
    ]
    return [made[i] for i in order or range(E)]


def signatures(order: list[int] | None = None, rank: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made: list[dict[str, Tensor]] = []
    for _ in range(E):
        x = torch.randn(200, D, generator=generator) @ torch.randn(D, D, generator=generator)
        x = x + torch.randn(D, generator=generator)
        _, s, v = torch.linalg.svd((x - x.mean(0)) / 200**0.5, full_matrices=False)
        one = {"mean": x.mean(0), "variance": x.var(0, unbiased=False), "count": torch.tensor(200.0)}
        made.append(one | ({"factor": s[:rank, None] * v[:rank]} if rank else {}))
    return [made[i] for i in order or range(E)]


def rows(order: list[int] | None = None) -> Tensor:
    return torch.randn(E, D, generator=torch.Generator().manual_seed(2))[order or list(range(E))]


SCORES: dict[str, Callable[[list[int] | None], AbstractScores]] = {
    "prototypes": lambda order: PrototypeScores(rows(order)),
    "arrow": lambda order: ArrowScores.from_lora(factors(order)),
    "spectral": lambda order: SpectralScores.from_lora(factors(order)),
    "subspace": lambda order: SpectralScores.from_subspace(factors(order)),
    "signature": lambda order: SignatureScores.from_signatures(signatures(order)),
    "signature-factor": lambda order: SignatureScores.from_signatures(signatures(order, rank=3)),
}
every_scores = pytest.mark.parametrize("make", SCORES.values(), ids=SCORES)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 6, D, generator=torch.Generator().manual_seed(3))


@every_scores
def test_scores_are_finite_float32_and_of_the_right_shape(make: Callable[..., AbstractScores], x: Tensor) -> None:
    scores = make(None).eval()
    assert scores.num_experts == E
    for given in (x, x[0], x[0, 0], x.bfloat16(), torch.zeros_like(x), x[:, :0]):
        out = scores(given)
        assert out.shape == (*given.shape[:-1], E)
        assert out.dtype == torch.float32
        assert out.isfinite().all()
    assert torch.equal(scores(x), scores(x))


@every_scores
def test_scores_give_a_gradient(make: Callable[..., AbstractScores], x: Tensor) -> None:
    x.requires_grad_(True)
    make(None)(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0


@every_scores
def test_permuting_experts_permutes_scores(make: Callable[..., AbstractScores], x: Tensor) -> None:
    order = [3, 0, 4, 2, 1]
    torch.testing.assert_close(make(order)(x), make(None)(x)[..., order])


@every_scores
def test_scores_stay_float32_in_a_narrow_model_and_under_autocast(
    make: Callable[..., AbstractScores], x: Tensor
) -> None:
    scores = make(None)
    expected = scores(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scores(x), expected)
    assert torch.equal(scores.to(torch.bfloat16)(x), expected)


@every_scores
def test_tokens_are_scored_alone(make: Callable[..., AbstractScores], x: Tensor) -> None:
    torch.testing.assert_close(make(None)(x)[1, 2], make(None)(x[1, 2]))


@every_scores
def test_an_expert_without_factors_or_signature_is_finite(make: Callable[..., AbstractScores], x: Tensor) -> None:
    given: list[dict[str, Tensor] | None] = [*signatures()[:2], None]
    assert SignatureScores.from_signatures(given)(x)[..., 2].eq(0).all()
    some = [*factors()[:2], None]
    for made in (ArrowScores.from_lora(some), SpectralScores.from_lora(some), SpectralScores.from_subspace(some)):
        assert made(x)[..., 2].eq(0).all()


def token(**options: object) -> TokenRouter:
    return TokenRouter(PrototypeScores(rows()), 2, **options)  # type: ignore[arg-type]


ROUTERS: dict[str, Callable[[], AbstractRouter]] = {
    "token": token,
    "token-all-on": lambda: token(consensus=2.0, pooling=0.8, prior=1.0, null_expert=0.0, order=3),
    "token-encoder": lambda: token(consensus=2.0, pooling=0.8, prior=1.0, stream="encoder"),
    "token-cross": lambda: token(consensus=2.0, pooling=0.8, prior=1.0, stream="cross"),
    "token-alone": lambda: token(consensus=2.0, pooling=0.8, prior=1.0, stream="alone/pooler"),
    "token-arrow": lambda: TokenRouter(SCORES["arrow"](None), 3),
    "constant": lambda: ConstantRouter(torch.full((E,), 1 / E)),
    "task": lambda: TaskRouter(torch.eye(3, E)),
    "sigmoid": lambda: SigmoidGate(D),
    "mixture": lambda: MixtureWeights(E),
    "mixture-token": lambda: RoutedMixtureWeights(MixtureWeights(E), D),
    "mixture-sequence": lambda: RoutedMixtureWeights(MixtureWeights(E), D, prefix=2),
}


def neurons(**options: object) -> ProductKeyRouter:
    torch.manual_seed(0)
    return ProductKeyRouter(D, (5, 4), 3, 2, 8, **options)  # type: ignore[arg-type]


ROUTERS |= {
    "neurons": neurons,
    "neurons-own-keys": lambda: neurons(query_norm="layer", key_norm="rms", share_keys=False, query_bias=True),
    "neurons-sigmoid": lambda: neurons(gate="sigmoid", query_norm="past_batch"),
    "neurons-apart": lambda: neurons(gate="relu", query_norm="none", separate_heads=True),
}
every_router = pytest.mark.parametrize("make", ROUTERS.values(), ids=ROUTERS)


def condition() -> Condition:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
    return Condition(task_ids=torch.tensor([0, 2]), token_mask=mask, encoder_mask=mask, memory=RoutingMemory(rows=2))


@every_router
def test_routing_is_finite_broadcasts_and_repeats(make: Callable[[], AbstractRouter], x: Tensor) -> None:
    router = make().eval()
    for given in (x, x.bfloat16(), torch.zeros_like(x)):
        routing = router(given, condition())
        assert routing.num_experts == router.num_experts
        dense = routing.dense()
        assert dense.shape[-1] == router.num_experts
        assert dense.dtype == torch.float32
        assert dense.isfinite().all()
        assert (dense >= 0).all()
        torch.broadcast_shapes(dense.shape[:-1], given.shape[:-1])
        if not isinstance(router, SigmoidGate) and getattr(router, "gate", "softmax") == "softmax":
            whole = given.new_full(dense.shape[:-1], getattr(router, "heads", 1.0), dtype=torch.float32)
            if isinstance(router, ProductKeyRouter):
                whole[~condition().token_mask] = 0.0  # type: ignore[operator]
            torch.testing.assert_close(dense.sum(-1), whole, atol=1e-6, rtol=0)
        again = router(given, condition())
        assert torch.equal(again.weights, routing.weights)
        if routing.indices is not None and again.indices is not None:
            assert torch.equal(again.indices, routing.indices)
            assert (routing.indices >= 0).all()
            assert (routing.indices < router.num_experts).all()


@pytest.mark.parametrize(
    "name", [name for name in ROUTERS if name.startswith(("token", "neurons")) or name == "sigmoid"]
)
def test_routers_give_a_gradient(name: str, x: Tensor) -> None:
    router = ROUTERS[name]()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x.requires_grad_(True)
    (router(x, condition()).weights ** 2).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["token", "token-all-on", "token-encoder", "neurons"])
def test_permuting_the_batch_permutes_the_routing(name: str, x: Tensor) -> None:
    given = condition()
    assert given.token_mask is not None
    flipped = Condition(
        token_mask=given.token_mask.flip(0), encoder_mask=given.token_mask.flip(0), memory=RoutingMemory()
    )
    here, there = ROUTERS[name]()(x, given).dense(), ROUTERS[name]()(x.flip(0), flipped).dense()
    torch.testing.assert_close(here, there.flip(0))


OPTIONS: list[dict[str, float]] = [
    {},
    {"consensus": 2.0},
    {"pooling": 0.5},
    {"consensus": 1.0, "prior": 2.0},
    {"null_expert": 0.1},
]


def pass_twice(scores: Tensor, allowed: Tensor | None, x: Tensor, **options: float) -> Tensor:
    """Routing at the second of two sites, where every option has something to say."""
    memory = RoutingMemory()
    out = torch.zeros(())
    for order in range(2):
        router = TokenRouter(PrototypeScores(scores), 2, allowed=allowed, order=order, **options)  # type: ignore[arg-type]
        out = router(x if order == 0 else x.flip(-1), Condition(memory=memory)).dense()
    return out


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_masking_an_expert_equals_removing_it(options: dict[str, float], x: Tensor) -> None:
    keep = [0, 1, 3, 4]
    allowed = torch.tensor([True, True, False, True, True])
    masked, removed = pass_twice(rows(), allowed, x, **options), pass_twice(rows()[keep], None, x, **options)
    assert masked[..., 2].eq(0).all()
    kept = keep + ([5] if "null_expert" in options else [])
    torch.testing.assert_close(masked[..., kept], removed, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_permuting_experts_permutes_the_routing(options: dict[str, float], x: Tensor) -> None:
    order = [3, 0, 4, 2, 1]
    whole = order + ([5] if "null_expert" in options else [])
    torch.testing.assert_close(
        pass_twice(rows()[order], None, x, **options),
        pass_twice(rows(), None, x, **options)[..., whole],
        atol=1e-6,
        rtol=1e-5,
    )


def test_ties_go_to_the_lowest_id(x: Tensor) -> None:
    routing = TokenRouter(PrototypeScores(torch.zeros(E, D)), 2)(x, Condition())
    assert routing.indices is not None
    assert torch.equal(routing.indices, torch.tensor([0, 1]).expand(2, 6, 2))


def test_nobody_to_choose_from_gives_no_weight_and_no_nan(x: Tensor) -> None:
    x.requires_grad_(True)
    for options in ({}, {"consensus": 1.0, "prior": 1.0, "pooling": 0.5}):
        router = token(allowed=torch.zeros(E, dtype=torch.bool), **options)
        routing = router(x, Condition(memory=RoutingMemory()))
        assert routing.weights.eq(0).all()
        routing.weights.sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()


def test_fewer_allowed_than_k_leaves_the_rest_unweighted(x: Tensor) -> None:
    routing = token(allowed=torch.tensor([False, False, True, False, False]))(x, Condition())
    assert torch.equal(routing.dense(), torch.eye(E)[2].expand(2, 6, E))


def test_an_offset_moves_the_choice(x: Tensor) -> None:
    routing = token(offset=torch.tensor([0.0, 0.0, 0.0, 100.0, 0.0]))(x, Condition())
    assert routing.leader().eq(3).all()


def test_what_the_backbone_outscores_gets_nothing() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.0], [-1.0, -2.0, -3.0, 0.0], [1.0, -1.0, -2.0, 0.0]])
    dense = choose(scores, 3, null_expert=3).dense()
    first = torch.softmax(torch.tensor([3.0, 1.0, 2.0]), -1)
    third = torch.softmax(torch.tensor([1.0, 0.0]), -1)
    expected = torch.tensor([[*first, 0.0], [0.0, 0.0, 0.0, 1.0], [third[0], 0.0, 0.0, third[1]]])
    torch.testing.assert_close(dense, expected)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"pooling": 1.0}, "pooling=1.0"),
        ({"consensus": -1.0}, "consensus=-1.0"),
        ({"stream": "sideways"}, "stream='sideways'"),
        ({"allowed": torch.ones(3, dtype=torch.bool)}, "allowed has 3"),
        ({"offset": torch.ones(7)}, "offset has 7"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        token(**options)


def test_top_k_beyond_the_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k=6"):
        TokenRouter(PrototypeScores(rows()), 6)


@pytest.mark.parametrize("options", [{"consensus": 1.0}, {"pooling": 0.5}, {"prior": 1.0}], ids=str)
def test_sharing_outside_of_a_pass_is_refused(options: dict[str, float], x: Tensor) -> None:
    closed = RoutingMemory()
    closed.end_pass()
    for memory in (None, closed):
        with pytest.raises(ValueError, match="needs the memory of a running pass"):
            token(**options)(x, Condition(memory=memory))
