"""The terms against collapse, against plain sums over materialised experts and the formulas of the papers."""

import math
from collections import Counter

import pytest
import torch

from mixwright.ops import collapse

DOUBLE = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def plain_entropy(row):
    total = sum(row)
    return -sum(p / total * math.log(p / total) for p in row if p > 0)


def test_entropy_of_rows_that_need_not_sum_to_one():
    rows = draw(3, 2, 5).exp()
    got = collapse.entropy(rows)
    assert got.shape == (3, 2)
    wanted = [plain_entropy(row) for row in rows.reshape(-1, 5).tolist()]
    torch.testing.assert_close(got.flatten(), torch.tensor(wanted, dtype=DOUBLE), rtol=1e-12, atol=1e-12)


def test_entropy_with_zeros_has_a_value_and_a_finite_gradient():
    weights = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    collapse.entropy(weights).sum().backward()
    assert collapse.entropy(weights).item() == 0.0
    assert torch.isfinite(weights.grad).all()


def test_mutual_information_from_the_joint_distribution():
    table = torch.softmax(draw(6, 2, 4), -1)
    got = collapse.mutual_information(table)
    for position in range(2):
        joint = table[:, position] / 6
        independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
        wanted = (joint * (joint / independent).log()).sum()
        torch.testing.assert_close(got[position], wanted, rtol=1e-12, atol=1e-12)


def test_mutual_information_at_its_ends():
    assert collapse.mutual_information(torch.full((5, 4), 0.25)).abs() < 1e-7
    one_hot = torch.eye(4).repeat(2, 1)
    assert collapse.mutual_information(one_hot).item() == pytest.approx(math.log(4))
    alike = torch.eye(4)[[1, 1, 1]]
    assert collapse.mutual_information(alike).item() == pytest.approx(0.0)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_overlap_is_the_mean_square_cosine_of_the_built_experts(order):
    experts, rank = 4, 3
    leaves = [draw(experts, rank, 2 + n, seed=n) for n in range(order)]
    built = leaves[0]
    for leaf in leaves[1:]:
        built = torch.einsum("srp,srq->srpq", built, leaf).flatten(2)
    wanted = 0.0
    for a in range(experts):
        for b in range(experts):
            cosines = torch.nn.functional.cosine_similarity(built[a], built[b], dim=-1)
            wanted += cosines.mean().item() ** 2 / experts**2
    assert collapse.overlap(leaves).item() == pytest.approx(wanted - 1 / experts, rel=1e-12)


def test_overlap_takes_columns_of_any_number_of_axes():
    leaf = draw(3, 2, 4, 5)
    torch.testing.assert_close(collapse.overlap([leaf]), collapse.overlap([leaf.flatten(1, 2)]), rtol=0, atol=0)


def test_overlap_of_orthogonal_and_of_equal_experts():
    assert collapse.overlap([torch.eye(4)[:, None]]).item() == 0.0
    assert collapse.overlap([torch.ones(4, 2, 5)]).item() == pytest.approx(1 - 1 / 4)


def test_overlap_of_leaves_at_zero_is_nothing_and_moves_nothing_far():
    first, last = draw(4, 2, 5).requires_grad_(), torch.zeros(4, 2, 5, dtype=DOUBLE, requires_grad=True)
    value = collapse.overlap([first, last])
    assert value.item() == 0.0
    value.backward()
    assert first.grad.abs().max() == 0.0 == last.grad.abs().max()
    small = (1e-6 * draw(4, 2, 5, seed=3)).requires_grad_()
    collapse.overlap([first.detach(), small]).backward()
    assert small.grad.abs().max() < 1e-2


def test_surplus_has_a_floor():
    few, many = torch.full((3, 4), -8.0), torch.zeros(3, 4)
    assert collapse.surplus(few).item() == 0.0
    assert collapse.surplus(many).item() == pytest.approx(0.5 - 0.25)


def plain_prior(choices, alpha):
    """Griffiths and Ghahramani 2005, equation 14, with factorials of whole numbers."""
    tasks = len(choices)
    columns = [tuple(row[k] for row in choices) for k in range(len(choices[0]))]
    used = [column for column in columns if any(column)]
    p = alpha ** len(used) * math.exp(-alpha * sum(1 / i for i in range(1, tasks + 1)))
    for count in Counter(used).values():
        p /= math.factorial(count)
    for column in used:
        m = sum(column)
        p *= math.factorial(tasks - m) * math.factorial(m - 1) / math.factorial(tasks)
    return -math.log(p)


@pytest.mark.parametrize("alpha", [0.7, 1.0, 3.0])
def test_indian_buffet_is_the_published_probability(alpha):
    choices = [[1, 0, 1, 1, 0], [1, 0, 0, 0, 0], [0, 0, 1, 1, 0], [1, 1, 0, 0, 0]]
    logits = 4.0 * (2 * torch.tensor(choices, dtype=DOUBLE) - 1)
    assert collapse.indian_buffet(logits, alpha).item() == pytest.approx(plain_prior(choices, alpha), rel=1e-12)


def test_indian_buffet_of_nobody_using_anything():
    assert collapse.indian_buffet(torch.full((3, 2), -5.0)).item() == pytest.approx(1 + 1 / 2 + 1 / 3)


def test_indian_buffet_passes_the_gradient_straight_through_the_rounding():
    logits = draw(6, 4).requires_grad_()
    collapse.indian_buffet(logits).backward()
    scores = torch.sigmoid(logits.detach())
    m = scores.round().sum(0)
    slope = torch.where(m > 0, torch.digamma(6 - m + 1) - torch.digamma(m.clamp_min(1)), 0.0)
    torch.testing.assert_close(logits.grad, slope * scores * (1 - scores), rtol=1e-10, atol=1e-12)


def test_gradients_are_those_of_the_values():
    table = torch.softmax(draw(5, 2, 4), -1).requires_grad_()
    assert torch.autograd.gradcheck(collapse.entropy, (table,))
    assert torch.autograd.gradcheck(collapse.mutual_information, (table,))
    leaves = [draw(3, 2, 4, seed=n).requires_grad_() for n in range(3)]
    assert torch.autograd.gradcheck(lambda *given: collapse.overlap(given), leaves)
    assert torch.autograd.gradcheck(collapse.surplus, (draw(5, 4).requires_grad_(),))
