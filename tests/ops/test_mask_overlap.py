"""How much masks overlap, smoothly: values and gradients against autograd through the formula."""

import pytest
import torch

from mixwright.ops import mask_overlap
from mixwright.ops.hard_concrete import DEAD, expected_l0
from mixwright.ops.mask_overlap import expected_overlap, expected_overlap_plain


@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (3, 64), (4, 5, 13), (5, 129), (3,), (2, 0)])
def test_chunks_give_the_value_and_the_gradient_of_the_formula(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mask_overlap, "_CHUNK", 32)
    draw = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(shape, generator=draw, dtype=torch.float64)).requires_grad_()
    cotangent = torch.randn(shape[0], shape[0], generator=draw, dtype=torch.float64)  # not symmetric
    found, plain = expected_overlap(logits), expected_overlap_plain(logits)
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-14)
    (slope,) = torch.autograd.grad(found, logits, cotangent)
    (expected,) = torch.autograd.grad(plain, logits, cotangent)
    torch.testing.assert_close(slope, expected, rtol=1e-11, atol=1e-14)


def test_it_can_be_differentiated_twice() -> None:
    logits = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(expected_overlap, (logits,))


def test_it_is_the_share_on_which_both_act_where_masks_are_drawn() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, 40, generator=draw, dtype=torch.float64)
    acting = torch.rand(20_000, 2, 40, generator=draw, dtype=torch.float64) < torch.sigmoid(logits - DEAD)
    drawn = (acting[:, 0] & acting[:, 1]).double().mean(1)
    assert abs(float(drawn.mean() - expected_overlap(logits)[0, 1])) < 4 * float(drawn.std()) / 20_000**0.5
    flat = torch.full((2, 9), 0.7)  # masks that are alike everywhere are independent
    torch.testing.assert_close(expected_overlap(flat)[0, 1], expected_l0(flat).prod())


def test_half_precision_is_read_in_float32_and_learns_in_its_own() -> None:
    logits = torch.randn(2, 50, dtype=torch.bfloat16, requires_grad=True)
    found = expected_overlap(logits)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected_overlap(logits.detach().float()))
    found.sum().backward()
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16
