import copy

import pytest
import torch
from torch import Tensor

from mixwright.routers.mixture_weights import MixtureWeights
from mixwright.routers.routed_weights import RoutedMixtureWeights, stream_mean
from mixwright.routing import Condition, RoutingMemory

M, D, B, T = 3, 8, 2, 6


def row(*logits: float, **options: object) -> MixtureWeights:
    made = MixtureWeights(len(logits), **options)  # type: ignore[arg-type]
    made.logits.data.copy_(torch.tensor(logits))
    return made


def stream(batch: int = B, seq: int = T, seed: int = 0) -> Tensor:
    return torch.randn(batch, seq, D, generator=torch.Generator().manual_seed(seed))


def asked(router: torch.nn.Module, x: Tensor | None = None, **given: object) -> Tensor:
    condition = Condition(memory=RoutingMemory(), **given)  # type: ignore[arg-type]
    return router(stream() if x is None else x, condition).dense()


def test_weights_are_a_softmax_over_who_is_allowed() -> None:
    weights = row(1.0, -2.0, 0.5)
    torch.testing.assert_close(asked(weights), torch.tensor([1.0, -2.0, 0.5]).softmax(-1))
    weights.allowed[0] = False
    routing = weights(stream(), Condition())
    assert routing.indices is not None and routing.indices.tolist() == [1, 2] and routing.num_experts == M
    torch.testing.assert_close(routing.weights, torch.tensor([-2.0, 0.5]).softmax(-1))
    assert torch.equal(weights.weights(), routing.dense())


def test_one_who_is_allowed_alone_has_exactly_one() -> None:
    weights = row(0.3, -80.0, 2.0)
    weights.allowed.copy_(torch.tensor([False, True, False]))
    assert asked(weights).tolist() == weights.weights().tolist() == [0.0, 1.0, 0.0]


def test_nobody_allowed_is_refused() -> None:
    weights = row(0.0, 0.0)
    weights.allowed.fill_(False)
    with pytest.raises(ValueError, match="none of 2 components is allowed"):
        weights(stream(), Condition())


@pytest.mark.parametrize("given", [[0.0, 1.0, 0.0], [0.25, 0.75, 0.0], [0.1, 0.2, 0.7], [1.0, 0.0, 0.0]])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_what_is_set_is_read(given: list[float], temperature: float) -> None:
    weights = row(5.0, -1.0, 0.0, anneal=(temperature, 0.1))
    weights.set(torch.tensor(given))
    for found in (weights.weights(), asked(weights)):
        torch.testing.assert_close(found, torch.tensor(given), atol=1e-6, rtol=0)
        assert found[torch.tensor(given) == 0].eq(0).all()
        assert max(given) < 1 or found.tolist() == given
    weights.allowed.fill_(True)
    assert weights.weights().isfinite().all() and (weights.weights() > 0).all()


@pytest.mark.parametrize("given", [[0.5, 0.4, 0.0], [1.5, -0.5, 0.0], [0.5, 0.5]])
def test_what_is_no_point_of_the_simplex_is_refused(given: list[float]) -> None:
    with pytest.raises(ValueError, match="expected 3 numbers of at least 0 that sum to 1"):
        row(0.0, 0.0, 0.0).set(torch.tensor(given))


def test_the_same_routing_comes_again_until_something_changes() -> None:
    weights = row(1.0, 2.0, 0.0).eval().requires_grad_(False)
    first = weights(stream(), Condition())
    assert weights(stream(), Condition()) is first
    weights.allowed[2] = False
    second = weights(stream(), Condition())
    assert second is not first and second.dense()[2] == 0
    weights.logits.add_(torch.tensor([1.0, 0.0, 0.0]))
    assert weights(stream(), Condition()).dense()[0] > second.dense()[0]
    with torch.inference_mode():
        held = weights(stream(), Condition())
    assert not held.weights.is_inference() and copy.deepcopy(weights)(stream(), Condition()) is not held


def test_logits_and_temperature_stay_float32_in_a_model_that_is_cast() -> None:
    weights = row(0.1234567, -0.7654321, anneal=(0.7654321, 0.1))
    expected = weights.weights()
    cast = copy.deepcopy(weights).to(torch.bfloat16)
    assert cast.logits.dtype == cast.temperature.dtype == torch.float32
    assert torch.equal(cast.weights(), expected)
    assert copy.deepcopy(weights).double().weights().dtype == torch.float64


def test_the_temperature_falls_with_the_progress_to_one_hot_and_stays() -> None:
    weights = row(1.0, 0.0, anneal=(2.0, 0.02))
    assert float(weights.temperature) == 2.0
    sharpest: list[float] = []
    for share in (0.0, 0.5, 1.0):
        weights.progress = share
        sharpest.append(float(weights.weights().detach().max()))
    assert sharpest == sorted(sharpest) and sharpest[-1] == 1.0
    torch.testing.assert_close(weights.temperature, torch.tensor(0.02))
    plain = row(1.0, 0.0)
    plain.load_state_dict(weights.state_dict())
    plain.progress = 0.0  # trained on without annealing, it keeps what it has
    assert torch.equal(plain.weights(), weights.weights())
    with pytest.raises(ValueError, match="two temperatures over 0"):
        MixtureWeights(2, anneal=(1.0, 0.0))


def drawn(weights: MixtureWeights, count: int = 500) -> Tensor:
    torch.manual_seed(0)
    return torch.stack([asked(weights).detach() for _ in range(count)])


@pytest.mark.parametrize("draw", ["gumbel", "dirichlet"])
def test_draws_are_on_the_simplex_and_only_in_training(draw: str) -> None:
    weights = row(1.0, -1.0, 3.0, draw=draw)
    weights.allowed[2] = False
    found = drawn(weights, 50)
    assert found[:, 2].eq(0).all() and (found >= 0).all()
    torch.testing.assert_close(found.sum(-1), torch.ones(50), atol=1e-6, rtol=0)
    assert found[:, 0].std() > 0.05
    weights.eval()
    assert torch.equal(drawn(weights, 2), weights.weights().expand(2, M))
    weights.train().set(torch.tensor([0.0, 1.0, 0.0]))
    assert torch.equal(drawn(weights, 2), torch.eye(M)[[1, 1]])


@pytest.mark.parametrize("draw", ["gumbel", "dirichlet"])
def test_a_pass_draws_once_and_the_next_one_again(draw: str) -> None:
    weights, memory = row(0.0, 1.0, draw=draw), RoutingMemory()
    torch.manual_seed(5)
    memory.begin_pass()
    first, second = (weights(stream(), Condition(memory=memory)).dense() for _ in range(2))
    assert torch.equal(first, second)
    memory.begin_pass()
    assert not torch.equal(weights(stream(), Condition(memory=memory)).dense(), first)
    torch.manual_seed(5)
    memory.begin_pass()
    assert torch.equal(weights(stream(), Condition(memory=memory)).dense(), first)
    memory.end_pass()
    with pytest.raises(ValueError, match="after their pass was over"):
        weights(stream(), Condition(memory=memory))


def test_rows_of_their_own_draw_for_themselves() -> None:
    memory = RoutingMemory()
    rows = [row(0.0, 0.0, draw="gumbel") for _ in range(2)]  # both alive: a pass knows rows by their identity
    one, other = (each(stream(), Condition(memory=memory)).dense() for each in rows)
    assert not torch.equal(one, other)


def test_dirichlet_has_its_mean_at_the_weights_and_begins_uniform() -> None:
    weights = row(1.0, -1.0, 0.5, draw="dirichlet")
    torch.testing.assert_close(drawn(weights).mean(0), weights.weights(), atol=0.05, rtol=0)
    flat = drawn(row(0.0, 0.0, draw="dirichlet"))[:, 0].sort().values  # Dirichlet(1, 1) is the uniform distribution
    assert float((flat - torch.linspace(0, 1, len(flat))).abs().max()) < 0.07


def test_gumbel_is_the_softmax_of_noisy_logits() -> None:
    """P(argmax = m) = softmax(a)_m, whatever the temperature."""
    weights = row(1.0, -1.0, 0.5, draw="gumbel", anneal=(0.2, 0.2))
    shares = torch.bincount(drawn(weights).argmax(-1), minlength=3) / 500
    torch.testing.assert_close(shares, weights.logits.softmax(-1), atol=0.06, rtol=0)


def test_the_pathwise_gradient_is_that_of_the_mean() -> None:
    """d/da E[alpha_0] by draws against the closed form, within five standard errors."""
    weights = row(0.4, -0.3, draw="dirichlet")
    torch.manual_seed(0)
    grads = torch.stack([torch.autograd.grad(asked(weights)[0], weights.logits)[0] for _ in range(400)])
    expected = torch.autograd.grad(weights.weights()[0], weights.logits)[0]
    error = 5 * grads.std(0) / len(grads) ** 0.5
    assert ((grads.mean(0) - expected).abs() < error).all() and float(error.max()) < 0.15


@pytest.mark.parametrize("draw", ["gumbel", "dirichlet"])
def test_draws_at_the_ends_of_the_simplex_have_finite_gradients(draw: str) -> None:
    weights = row(20.0, -20.0, 0.0, draw=draw)
    torch.manual_seed(0)
    for _ in range(50):
        found = asked(weights)
        assert found.isfinite().all()
        assert torch.autograd.grad(found.square().sum(), weights.logits)[0].isfinite().all()


def routed(prefix: int = 0, *, zero: bool = False, **options: object) -> RoutedMixtureWeights:
    made = RoutedMixtureWeights(row(0.2, -0.5, 0.1, **options), D, prefix)
    if not zero:
        torch.nn.init.normal_(made.slope, generator=torch.Generator().manual_seed(4))
    return made.requires_grad_(False).eval()


every_prefix = pytest.mark.parametrize("prefix", [0, 3], ids=["token", "sequence"])


@every_prefix
def test_input_dependent_weights_start_as_the_static_ones(prefix: int) -> None:
    router = routed(prefix, zero=True)
    assert torch.equal(asked(router), router.weights().expand(B, T, M))


@every_prefix
def test_no_token_looks_ahead(prefix: int) -> None:
    router, x = routed(prefix), stream()
    before = asked(router, x)
    for t in range(T):
        changed = x.clone()
        changed[:, t:] += 1.0
        assert torch.equal(asked(router, changed)[:, :t], before[:, :t])
    assert not torch.equal(before[:, 0], before[:, -1])


def test_a_sequence_chooses_once_after_its_prefix() -> None:
    router = routed(3)
    found = asked(router)
    assert torch.equal(found[:, :2], router.weights().expand(B, 2, M))
    assert found[:, 2:].allclose(found[:, 2:3], atol=1e-7) and not torch.equal(found[0, 2], found[1, 2])


@every_prefix
def test_step_by_step_is_one_pass_whoever_moves_the_rows(prefix: int) -> None:
    router, x, memory = routed(prefix), stream(), RoutingMemory()
    parts: list[Tensor] = []
    for start, end in ((0, 3), (3, 4), (4, 6)):
        if start == 4:
            memory.select(torch.tensor([1, 0]))
        memory.begin_pass(B)
        seen = x[:, start:end] if start < 4 else x[[1, 0], start:end]
        parts.append(router(seen, Condition(memory=memory)).dense())
        memory.end_pass()
    found = torch.cat([parts[0], parts[1], parts[2][[1, 0]]], 1)
    torch.testing.assert_close(found, asked(router, x), atol=1e-6, rtol=0)


@every_prefix
def test_left_padding_changes_nothing(prefix: int) -> None:
    router, x = routed(prefix), stream()
    mask = torch.tensor([[0, 0] + [1] * T, [0, 0] + [1] * T]).bool()
    padded = torch.cat([99 * torch.ones(B, 2, D), x], 1)
    found = asked(router, padded, token_mask=mask)
    torch.testing.assert_close(found[:, 2:], asked(router, x), atol=1e-6, rtol=0)
    torch.testing.assert_close(found[:, :2], router.weights().expand(B, 2, M))


def test_the_scale_of_the_stream_does_not_matter_and_zeros_are_no_accident() -> None:
    router = routed()
    torch.testing.assert_close(asked(router, 1e-3 * stream()), asked(router), atol=1e-5, rtol=0)
    assert torch.equal(asked(router, torch.zeros(B, T, D)), router.weights().expand(B, T, M))


def test_every_slot_of_a_pass_reads_the_first_ones_stream() -> None:
    first, later, memory = routed(), routed(), RoutingMemory()
    given = Condition(memory=memory)
    one = first(stream(), given).dense()
    assert torch.equal(later(stream(seed=9), given).dense(), one)
    last = later(stream(seed=9)[:, -2:], given).dense()  # a head with the last tokens only
    torch.testing.assert_close(last, one[:, -2:])
    assert later(stream(seq=1)[..., :4], Condition(memory=RoutingMemory())).dense().shape == (B, 1, M)


def test_the_embeddings_row_looks_at_the_embeddings_of_those_it_allows() -> None:
    router, embeddings = routed(), [stream(seed=m)[..., : D - m] for m in range(M)]
    router.embed = lambda m, _: embeddings[m]
    router.set(torch.tensor([0.3, 0.0, 0.7]))
    plain = routed()
    plain.set(torch.tensor([0.3, 0.0, 0.7]))
    seen = embeddings[0] + torch.nn.functional.pad(embeddings[2], (0, 2))
    torch.testing.assert_close(asked(router, torch.zeros(B, T, 1)), asked(plain, seen))


def test_who_is_not_allowed_has_no_weight_for_any_input() -> None:
    router = routed()
    router.set(torch.tensor([0.3, 0.0, 0.7]))
    routing = router(stream(), Condition(memory=RoutingMemory()))
    assert routing.indices is not None and routing.indices.shape == (B, T, 2)
    assert routing.dense()[..., 1].eq(0).all()
    router.set(torch.tensor([0.0, 1.0, 0.0]))
    assert asked(router).tolist() == [0.0, 1.0, 0.0]


def test_noise_and_input_go_together_and_dirichlet_does_not() -> None:
    router = routed(draw="gumbel").train()
    torch.manual_seed(0)
    noise = asked(router).log() - asked(routed()).log()
    noise = noise - noise[..., :1]
    torch.testing.assert_close(noise, noise[:1, :1].expand(B, T, M), atol=1e-5, rtol=0)
    assert float(noise.abs().max()) > 0.1
    with pytest.raises(ValueError, match="draw=dirichlet"):
        asked(routed(draw="dirichlet").train())


def test_what_it_can_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="need the memory of a running pass"):
        routed()(stream(), Condition())
    with pytest.raises(ValueError, match="the cache holds 4 tokens"):
        routed()(stream(), Condition(memory=RoutingMemory(unseen=4)))


def test_the_mean_is_over_real_tokens_up_to_the_own() -> None:
    x, real = stream(), torch.tensor([[0, 1, 1, 0, 1, 1], [1] * T]).float()
    found = stream_mean(RoutingMemory(), "n", x, real)
    mean = (x[0, [1, 2, 4]]).mean(0)
    torch.testing.assert_close(found[0, 4], mean / mean.square().mean().sqrt())
    assert found[0, 0].eq(0).all() and torch.equal(found[0, 3], found[0, 2])


def test_gradients_reach_the_slope_and_the_logits() -> None:
    router = routed().requires_grad_(True)
    asked(router)[..., 0].sum().backward()
    for parameter in (router.slope, router.static.logits):
        assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0
