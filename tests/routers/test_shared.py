"""Scores shared by sites that read one tensor equal the scores of each site alone, whatever happens between them."""

import copy
import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from mixwright.routers.arrow import ArrowScores
from mixwright.routers.gate import PrototypeScores
from mixwright.routers.shared import share


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pools(sizes=(3, 5, 2), width=12):
    gates = [random(size, width, seed=seed) for seed, size in enumerate(sizes)]
    together = [PrototypeScores(rows) for rows in gates]
    return [PrototypeScores(rows) for rows in gates], together, share(together)


def count(group):
    calls, compute = [], group._compute
    group._compute = lambda x: calls.append(1) or compute(x)
    return calls


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 11), min_size=2, max_size=4), st.integers(2, 40), st.integers(1, 9))
def test_shared_scores_equal_scores_alone_up_to_rounding(sizes, width, tokens):
    alone, together, group = pools(sizes, width)
    x, calls = random(2, tokens, width, seed=50), count(group)
    for _ in range(2):
        for one, other in zip(alone, together, strict=True):
            # One product of more columns may sum in another order.
            torch.testing.assert_close(other(x), one(x), atol=1e-5, rtol=1e-5)
    assert len(calls) == 2


def test_float64_inputs_and_shared_gates_agree_too():
    alone, together, _ = pools()
    x = random(4, 12, seed=9, dtype=torch.float64)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(other(x), one(x), atol=1e-12, rtol=1e-12)


def test_another_tensor_or_a_changed_one_is_scored_anew():
    alone, together, group = pools()
    x, calls = random(4, 12, seed=9), count(group)
    together[0](x)
    torch.testing.assert_close(together[1](x.clone()), alone[1](x))
    together[0](x)
    x.mul_(-1).add_(random(4, 12, seed=10))
    torch.testing.assert_close(together[1](x), alone[1](x))
    assert len(calls) == 4
    alone[2].prototypes.neg_()
    together[2].prototypes.neg_()
    torch.testing.assert_close(together[0](x.clone()), alone[0](x))
    torch.testing.assert_close(together[2](x), alone[2](x))


def test_one_site_asked_twice_gets_the_same_answer():
    alone, together, _ = pools()
    x = random(4, 12, seed=9)
    for _ in range(3):
        torch.testing.assert_close(together[1](x), alone[1](x))


def test_nothing_is_held_once_the_input_is_gone():
    _, together, group = pools()
    x = random(4, 12, seed=9)
    watched = weakref.ref(x)
    kept = weakref.ref(together[0](x))
    together[1](x)
    assert watched() is not None and group._waiting
    del x
    gc.collect()
    assert watched() is None and kept() is None and not group._waiting
    y = random(4, 12, seed=9)
    for member in together:
        member(y)
    assert not group._waiting


def test_an_error_between_two_sites_leaves_nothing_wrong():
    alone, together, _ = pools()

    def failing():
        x = random(4, 12, seed=9)
        together[0](x)
        raise RuntimeError("between")

    with pytest.raises(RuntimeError, match="between"):
        failing()
    x = random(4, 12, seed=8)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(other(x), one(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_and_checkpointing_see_each_site_alone(reentrant):
    alone, together, _ = pools()
    x = random(4, 12, seed=9)

    def total(sites, value):
        return sum(site(value * 1.5).square().sum() for site in sites)

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(alone, leaf), leaf)
    again = x.clone().requires_grad_()
    checkpoint(lambda value: total(together, value), again, use_reentrant=reentrant).backward()
    torch.testing.assert_close(again.grad, expected)
    with torch.no_grad():
        together[0](again)
    together[1](again).sum().backward()
    together[2](again).sum().backward()


def test_inference_mode_shares_and_a_later_pass_with_gradients_works():
    alone, together, group = pools()
    calls = count(group)
    with torch.inference_mode():
        x = random(4, 12, seed=9) * 2
        for one, other in zip(alone, together, strict=True):
            torch.testing.assert_close(other(x), one(x))
    assert len(calls) == 1
    leaf = random(4, 12, seed=9).requires_grad_()
    together[0](leaf).sum().backward()


def test_copies_share_among_themselves():
    _, together, group = pools()
    x = random(4, 12, seed=9)
    together[0](x)
    twins = copy.deepcopy(torch.nn.ModuleList(together))
    assert twins[0].group is twins[1].group is not group
    assert twins[0].group.members == tuple(twins)
    twins[1].prototypes.neg_()
    torch.testing.assert_close(twins[1](x), -together[1](x))


def test_only_prototypes_of_one_width_are_grouped():
    members = [PrototypeScores(random(3, 8)), ArrowScores(random(3, 8)), PrototypeScores(random(3, 9))]
    assert share(members) is None and members[0].group is None
    members.append(PrototypeScores(random(2, 8)))
    assert share(members).members == (members[0], members[3])
    assert share([]) is None
