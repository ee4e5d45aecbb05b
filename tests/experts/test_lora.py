"""LoRA experts of mixed ranks, scales and membership equal the sum over experts one by one."""

import pytest
import torch

from mixwright.experts.lora import LoraExperts
from mixwright.routing import Condition, Routing


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pool():
    """Five experts, the second no member here, of ranks 3, -, 1, 8, 2 and different scales."""
    ranks = [3, None, 1, 8, 2]
    return [
        None if rank is None else (random(e, rank, 12), random(50 + e, 7, rank), 0.5 + e)
        for e, rank in enumerate(ranks)
    ]


def one_by_one(factors, x, dense):
    out = x.new_zeros((*x.shape[:-1], 7))
    for expert, entry in enumerate(factors):
        if entry is not None:
            down, up, scale = entry
            out = out + dense[..., expert, None] * scale * (x @ down.T @ up.T)
    return out


@pytest.mark.parametrize("tokens", [1, 4, 60])
@pytest.mark.parametrize("gradients", [False, True])
def test_mixed_ranks_scales_and_members_equal_the_sum_one_by_one(tokens, gradients):
    factors, x = pool(), random(9, 2, tokens, 12)
    experts = LoraExperts.stack(factors)
    values, indices = random(8, 2, tokens, 5).topk(3, -1)
    routing = Routing(values.softmax(-1), 5, indices)
    with torch.set_grad_enabled(gradients):
        sparse = experts(x, routing, Condition())
        dense = experts(x, Routing(routing.dense(), 5), Condition())
    expected = one_by_one(factors, x, routing.dense())
    torch.testing.assert_close(sparse, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(dense, expected, atol=2e-5, rtol=1e-5)
    assert experts.members == [0, 2, 3, 4]


@pytest.mark.parametrize("gradients", [False, True])
def test_onto_is_the_base_plus_the_experts(gradients):
    experts, x, base = LoraExperts.stack(pool()), random(9, 3, 4, 12), random(7, 3, 4, 7)
    values, indices = random(8, 3, 4, 5).topk(2, -1)
    routing = Routing(values.softmax(-1), 5, indices)
    with torch.set_grad_enabled(gradients):
        expected = base + experts(x, routing, Condition())
        torch.testing.assert_close(experts.onto(base.clone(), x, routing, Condition()), expected)
        half = experts.onto(base.bfloat16(), x, routing, Condition())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.5, rtol=0.02)


def test_an_expert_that_is_no_member_does_nothing_even_beside_a_broken_one():
    factors = pool()
    experts = LoraExperts.stack(factors)
    with torch.no_grad():
        experts.down[0] = torch.nan
    for tokens in (1, 40):
        routing = Routing(torch.full((tokens, 1), 1.0), 5, torch.full((tokens, 1), 1))
        with torch.no_grad():
            assert (experts(random(9, tokens, 12), routing, Condition()) == 0).all()
        assert (experts(random(9, tokens, 12), routing, Condition()) == 0).all()


def test_one_choice_for_everything_touches_only_the_chosen():
    experts, x = LoraExperts.stack(pool()), random(9, 3, 4, 12)
    with torch.no_grad():
        experts.down[0] = torch.nan
    routing = Routing(torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0]]), 5)
    expected = one_by_one(pool(), x, routing.dense())
    torch.testing.assert_close(experts(x, routing, Condition()), expected, atol=1e-4, rtol=1e-5)


def test_gradients_reach_factors_of_chosen_experts_only():
    experts, x = LoraExperts.stack(pool()), random(9, 40, 12)
    routing = Routing(torch.ones(40, 1), 5, torch.full((40, 1), 3))
    experts(x, routing, Condition()).sum().backward()
    moved = experts.down.grad.abs().sum((1, 2)) > 0
    assert moved.tolist() == [False, False, True, False]


def test_rows_must_match_members():
    with pytest.raises(ValueError, match="2 members, but down, up and scale hold 3, 3, 3"):
        LoraExperts(torch.zeros(3, 1, 2), torch.zeros(3, 2, 1), torch.ones(3), 4, [0, 2])
    with pytest.raises(ValueError, match="no expert of the pool adapts this site"):
        LoraExperts.stack([None, None])
