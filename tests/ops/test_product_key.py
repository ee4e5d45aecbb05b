"""Product-key retrieval against brute force, exactly: scores, ids, ties and rounding; plain torch and compiled."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixwright.ops import best_sums as plain
from mixwright.ops import kernels, product_key
from mixwright.ops.product_key import (
    coverage,
    entropy,
    log_partition,
    product_key_top_k,
    product_key_top_k_reference,
    staircase,
)

FAMILIES = {
    "normal": lambda shape, make: torch.randn(shape, generator=make),
    "few values": lambda shape, make: torch.randint(-2, 3, shape, generator=make).float(),
    "halves and quarters": lambda shape, make: (torch.randn(shape, generator=make) * 4).round() / 4,
    "all alike": lambda shape, make: torch.full(shape, float(torch.rand((), generator=make))),
    "some out": lambda shape, make: torch.randn(shape, generator=make).masked_fill(
        torch.rand(shape, generator=make) < 0.5, -torch.inf
    ),
}


@pytest.fixture(params=["torch", "compiled"])
def path(request, monkeypatch):
    """The plain path, or the compiled one, which then has to be taken for float32."""
    found = request.getfixturevalue("compiled") if request.param == "compiled" else None
    monkeypatch.setattr(kernels, "kernel", lambda: found)
    if found is not None:
        monkeypatch.setattr(product_key, "best_sums", None)
    return request.param


@st.composite
def halves(draw):
    n1, n2 = draw(st.integers(1, 192)), draw(st.integers(1, 192))
    count = draw(st.one_of(st.sampled_from([1, 8, 16, 17, 32, 33]), st.integers(1, 300), st.just(n1 * n2)))
    make = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    one, other = (FAMILIES[draw(st.sampled_from(sorted(FAMILIES)))] for _ in range(2))
    scale = draw(st.sampled_from([1.0, 1e3, 1e7]))  # at 1e7 most sums round to what another does
    first, second = one((3, n1), make) * scale, other((3, n2), make)
    biases = [None, None]
    if draw(st.booleans()):
        biases = [
            FAMILIES[draw(st.sampled_from(["normal", "few values", "some out"]))](
                (draw(st.sampled_from([1, 3])), n), make
            )
            for n in (n1, n2)
        ]
    return first, second, min(count, n1 * n2, 3000), *biases


@settings(max_examples=120)
@given(drawn=halves())
def check(drawn):
    found, expected = product_key_top_k(*drawn), product_key_top_k_reference(*drawn)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.scores, expected.scores)
    assert found.indices.sort(dim=-1).values.diff(dim=-1).gt(0).all()


def test_it_is_a_stable_sort_of_all_sums(path):
    del path
    check()


def test_doubles_and_narrow_scores_are_taken_too(monkeypatch):
    monkeypatch.setattr(kernels, "kernel", lambda: None)
    make = torch.Generator().manual_seed(0)
    first, second = (torch.randn(2, 4, n, generator=make, dtype=torch.float64) for n in (20, 30))
    found, expected = product_key_top_k(first, second, 40), product_key_top_k_reference(first, second, 40)
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.scores, expected.scores)
    first, second = first.bfloat16(), second.bfloat16()
    found = product_key_top_k(first, second, 40)
    assert found.scores.dtype == torch.float32
    assert torch.equal(found.indices, product_key_top_k_reference(first.float(), second.float(), 40).indices)


@pytest.mark.parametrize("n", [512, 1024, 4001])
@pytest.mark.parametrize("k", [16, 32, 64, 100])
def test_it_is_right_on_long_rows(path, n, k):
    """The 3 k best of a half are enough for brute force."""
    del path
    make = torch.Generator().manual_seed(n + k)
    first, second = torch.randn(6, n, generator=make), torch.randn(6, n + 5, generator=make)
    first[0, ::64] += 50  # the best of a row all in one lane
    first[1] = first[1].sort().values
    second[2], second[3] = 0, second[3].sort(descending=True).values
    found = product_key_top_k(first, second, k)
    for row in range(6):
        i, j = (
            half.sort(descending=True, stable=True).indices[: 3 * k].sort().values for half in (first[row], second[row])
        )
        few = product_key_top_k_reference(first[row, i], second[row, j], k)
        assert torch.equal(found.scores[row], few.scores)
        assert torch.equal(found.indices[row], i[few.indices // len(j)] * (n + 5) + j[few.indices % len(j)])


@pytest.mark.parametrize(("n1", "n2"), [(9, 9), (3, 20), (20, 2)])
def test_dropping_any_pair_of_the_staircase_breaks_an_input(n1, n2):
    """Where a_i and b_j hold the top places down to (i, j) and nothing else comes near, that pair is among the best."""
    for k in (1, 4, 12, 16):
        pairs = set(zip(*(ranks.tolist() for ranks in staircase(k, n1, n2))))
        assert pairs == {(i, j) for i in range(n1) for j in range(n2) if (i + 1) * (j + 1) <= k}
        for i, j in pairs:
            first, second = (torch.where(torch.arange(n) <= c, 0.0, -9.0) for n, c in ((n1, i), (n2, j)))
            first, second = (half - 0.01 * torch.arange(len(half)) for half in (first, second))
            best = product_key_top_k_reference(first, second, k).indices.tolist()
            assert i * n2 + j in best


def test_the_staircase_at_16_has_50_pairs():
    assert len(staircase(16, 1024, 1024)[0]) == 50
    assert [len(staircase(k, 99, 99)[0]) for k in (8, 12, 17, 24, 32, 64)] == [20, 35, 52, 84, 119, 280]


def test_ids_reach_beyond_the_candidates(path):
    """Ids are of experts, not of places among the k^2 candidates: with random queries nearly all are found."""
    del path
    make = torch.Generator().manual_seed(0)
    first, second = (torch.randn(4000, 24, generator=make) for _ in range(2))
    ids = product_key_top_k(first, second, 4).indices
    assert len(ids.unique()) == 24 * 24 and ids.min() >= 0 and ids.max() < 24 * 24


def test_all_can_be_retrieved_and_no_more(path):
    del path
    first, second = torch.randn(2, 5), torch.randn(2, 7)
    assert torch.equal(product_key_top_k(first, second, 35).indices.sort(dim=-1).values, torch.arange(35).expand(2, 35))
    for k in (0, 36):
        with pytest.raises(ValueError, match=f"top_k={k}: expected 1 to 35, the experts of a grid of 5 x 7"):
            product_key_top_k(first, second, k)


def test_biases_choose_and_do_not_score(path):
    del path
    make = torch.Generator().manual_seed(1)
    first, second = torch.randn(9, 2, 12, generator=make), torch.randn(9, 2, 10, generator=make)
    bias = torch.randn(2, 12, generator=make)
    found = product_key_top_k(first, second, 8, bias)
    sums = first.gather(-1, found.indices // 10) + second.gather(-1, found.indices % 10)
    assert torch.equal(found.scores, sums)
    assert torch.equal(found.indices, product_key_top_k(first + bias, second, 8).indices)
    bias[:, 3:] = -torch.inf
    found = product_key_top_k(first, second, 33, bias)
    assert (found.indices[..., :30] // 10 < 3).all() and found.scores[..., :30].isfinite().all()
    assert (found.scores[..., 30:] == -torch.inf).all()


def test_gradients_go_to_the_retrieved(path):
    del path
    first, second = torch.randn(3, 12, requires_grad=True), torch.randn(3, 10, requires_grad=True)
    found = product_key_top_k(first, second, 5)
    found.scores.sum().backward()
    counts = torch.zeros(3, 12).scatter_add_(1, found.indices // 10, torch.ones(3, 5))
    assert torch.equal(first.grad, counts)
    assert second.grad.sum() == 15


def test_scores_that_are_no_numbers_still_give_ids_that_exist(path):
    del path
    for first in (torch.full((2, 70), torch.nan), torch.randn(2, 70).index_fill(1, torch.arange(66), torch.nan)):
        ids = product_key_top_k(first, torch.randn(2, 9), 16).indices
        assert ids.min() >= 0 and ids.max() < 630


def test_the_number_of_threads_does_not_change_a_bit(compiled, monkeypatch):
    monkeypatch.setattr(kernels, "kernel", lambda: compiled)
    first, second = torch.randn(300, 200), torch.randn(300, 120).round()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = product_key_top_k(first, second, 16)
        torch.set_num_threads(3)
        assert all(torch.equal(*both) for both in zip(one, product_key_top_k(first, second, 16)))
    finally:
        torch.set_num_threads(threads)


def test_rows_with_equals_are_sorted_and_the_others_are_not(monkeypatch):
    rows = []
    sort = plain._sorted
    monkeypatch.setattr(plain, "_sorted", lambda first, *rest: rows.append(len(first)) or sort(first, *rest))
    first, second = torch.randn(50, 40), torch.randn(50, 30)
    product_key_top_k(first, second, 16)
    assert sum(rows) <= 1
    first[7] = 0
    product_key_top_k(first, second, 16)
    assert rows[-1] >= 1


def test_coverage_is_the_mass_over_all_experts():
    make = torch.Generator().manual_seed(3)
    first, second = 2 * torch.randn(20, 60, generator=make), 2 * torch.randn(20, 50, generator=make)
    partition, before = log_partition(first, second), torch.zeros(20)
    masses = (first[:, :, None] + second[:, None]).flatten(1).double().softmax(1)
    for k in (1, 2, 5, 16, 100, 3000):
        found = product_key_top_k(first, second, k)
        share = coverage(found.scores, partition)
        assert (share.double() - masses.gather(1, found.indices).sum(1)).abs().max() < 2e-6
        assert (share > before).all() and (share <= 1).all()
        before = share
    assert share.min() > 1 - 2e-6


def test_entropy_is_that_of_the_softmax_over_all_experts():
    first, second = 2 * torch.randn(20, 60), 2 * torch.randn(20, 50)
    first[0, 5:] = -torch.inf
    masses = (first[:, :, None] + second[:, None]).flatten(1).double().softmax(1)
    assert (entropy(first, second).double() - torch.special.entr(masses).sum(1)).abs().max() < 2e-5
