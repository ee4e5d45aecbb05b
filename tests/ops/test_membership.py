"""Masks of 0 and 1 as bytes: the same merge as from logits, to the bit where both are compiled."""

import pytest
import torch

from mixwright.ops import kernels
from mixwright.ops.hard_concrete import DEAD, LIMIT, mask
from mixwright.ops.interpolate import interpolate
from mixwright.ops.membership import interpolate_members, membership, sums_of


def case(shape, experts, seed=0):
    draw = torch.Generator().manual_seed(seed)
    base, delta = (torch.randn(shape, generator=draw) for _ in range(2))
    logits = torch.where(torch.rand((experts, *shape), generator=draw) < 0.3, LIMIT, -LIMIT)
    return base, delta, logits, torch.softmax(torch.randn(experts, generator=draw), 0)


@pytest.mark.parametrize("experts", [1, 5, 8])
def test_bytes_say_who_acts(experts):
    logits = case((7, 11), experts)[2]
    codes = membership(logits)
    for expert in range(experts):
        assert torch.equal((codes >> expert & 1).bool(), mask(logits[expert]) == 1)


def test_only_masks_of_0_and_1_and_up_to_8_experts_have_bytes():
    logits = case((7, 11), 4)[2]
    assert membership(torch.cat([logits] * 3)) is None
    for end in (DEAD, -DEAD):
        logits[2, 3, 4] = end
        assert membership(logits) is not None
    for between in (0.0, torch.nan):
        logits[2, 3, 4] = between
        assert membership(logits) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_the_merge_from_logits(dtype):
    base, delta, logits, weights = case((7, 11), 6)
    base = base.to(dtype)
    base[0] = -0.0
    sums = sums_of(0.7 * weights)
    found = interpolate_members(base, delta, membership(logits), sums)
    torch.testing.assert_close(found, interpolate(base, delta, logits, weights, 0.7))
    out = (logits < 0).all(0)
    assert torch.equal(torch.signbit(found)[out], torch.signbit(base)[out])
    assert torch.equal(found[out], base[out])


@pytest.mark.parametrize("units", [1, 15, 512, 5003])
def test_the_compiled_path_has_the_bits_of_the_compiled_merge(compiled, monkeypatch, units):
    base, delta, logits, weights = case((units,), 8)
    base[::5] = -0.0
    weights[3] = 0.0
    plain = interpolate_members(base, delta, membership(logits), sums_of(0.7 * weights))
    monkeypatch.setattr(kernels, "kernel", lambda: compiled)
    monkeypatch.setattr(torch, "empty_like", lambda like: torch.full_like(like, torch.nan))
    found = interpolate_members(base, delta, membership(logits), sums_of(0.7 * weights))
    assert torch.equal(found, interpolate(base, delta, logits, weights, 0.7))
    assert torch.equal(torch.signbit(found), torch.signbit(plain))
    torch.testing.assert_close(found, plain)
