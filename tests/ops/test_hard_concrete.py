"""One map: its ends, its slope, its expected L0, and that counting logits is counting masks."""

import math

import pytest
import torch

from mixwright.ops.hard_concrete import (
    DEAD,
    expected_l0,
    hard_count,
    mask,
    mask_slope,
    noisy_mask,
)


def louizos(logits: torch.Tensor) -> torch.Tensor:
    return (torch.sigmoid(logits / (2 / 3)) * 1.2 - 0.1).clamp(0, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_map_and_where_it_is_exactly_zero_and_one(dtype):
    end = torch.tensor(DEAD, dtype=dtype)
    near = [torch.nextafter(end, torch.tensor(to, dtype=dtype)) for to in (-9.0, 9.0)]
    logits = torch.cat(
        [torch.linspace(-5, 5, 1001, dtype=dtype), torch.stack([end, *near]), -torch.stack([end, *near])]
    )
    z = mask(logits)
    wide = logits.to(z.dtype)
    assert z.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(z, louizos(wide), rtol=0, atol=2e-7)
    assert torch.equal(z == 0, wide <= DEAD)
    assert torch.equal(z == 1, wide >= -DEAD)
    assert hard_count(logits[None]).item() == (z != 0).sum().item()
    assert math.isclose(DEAD, -1.5986, abs_tol=1e-4)


def test_the_slope_is_the_gradient_and_zero_in_the_dead_zones():
    logits = torch.linspace(-5, 5, 997, dtype=torch.float64).requires_grad_()
    mask(logits).sum().backward()
    torch.testing.assert_close(mask_slope(logits.detach()), logits.grad, rtol=0, atol=1e-12)
    outside = logits.detach().abs() >= -DEAD
    assert not logits.grad[outside].any()
    assert (logits.grad[~outside] > 0).all()
    assert torch.autograd.gradcheck(mask, logits.detach()[::50].requires_grad_())


@pytest.mark.parametrize("shape", [(3, 5, 7), (2,), (1, 70001)])
def test_expected_l0_and_its_gradient_equal_the_formula(shape):
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(shape[0], dtype=torch.float64)
    plain = torch.sigmoid(logits - DEAD).reshape(shape[0], -1).mean(1)
    expected = torch.autograd.grad((plain * weights).sum(), logits)[0]
    value = expected_l0(logits)
    torch.testing.assert_close(value, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad((value * weights).sum(), logits)[0], expected, rtol=1e-10, atol=0)


def test_expected_l0_has_second_derivatives():
    logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(expected_l0, logits)


def test_expected_l0_is_the_share_of_noisy_masks_that_are_not_zero():
    generator = torch.Generator().manual_seed(0)
    for logit in (-3.0, -1.0, 0.5):
        logits = torch.full((1, 100_000), logit)
        share = (noisy_mask(logits, generator) != 0).double().mean().item()
        expected = expected_l0(logits).item()
        assert abs(share - expected) < 3 * math.sqrt(expected * (1 - expected) / 100_000)


def test_noise_comes_from_the_generator_alone_and_tries_dead_masks_again():
    logits = torch.full((1, 4096), -2.0)
    first, second = (noisy_mask(logits, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert hard_count(logits).item() == 0
    assert first.count_nonzero() > 100
