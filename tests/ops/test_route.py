"""Retrieval from queries and sub-keys, in one piece against the parts it is made of, values and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from mixwright.ops import kernels
from mixwright.ops import route as routed
from mixwright.ops import selected_scores as chosen
from mixwright.ops.product_key import product_key_top_k_reference
from mixwright.ops.route import route
from mixwright.ops.selected_scores import selected_scores, selected_scores_reference


@pytest.fixture(params=["torch", "compiled"])
def path(request, monkeypatch):
    found = request.getfixturevalue("compiled") if request.param == "compiled" else None
    monkeypatch.setattr(kernels, "kernel", lambda: found)
    if found is not None:
        monkeypatch.setattr(chosen, "selected_scores_reference", None)  # this file has its own name for it
        monkeypatch.setattr(routed, "product_key_top_k", None)
    return request.param


def case(tokens, heads, key_heads, n1, n2, half, dtype=torch.float32, seed=0):
    make = torch.Generator().manual_seed(seed)
    shapes = (tokens, heads, 2, half), (key_heads, n1, half), (key_heads, n2, half)
    return [torch.randn(shape, generator=make, dtype=dtype).requires_grad_() for shape in shapes]


def half_scores(queries, first, second):
    return (
        torch.einsum("thd,hnd->thn", queries[:, :, side], keys.expand(queries.shape[1], -1, -1))
        for side, keys in enumerate((first, second))
    )


def agree(tensors, k, biases=()):
    """Scores within rounding of the best ones there are, as those of their ids, and gradients as the plain ones."""
    found = route(*tensors, k, *biases)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    expected = product_key_top_k_reference(*half_scores(*wide), k, *biases)
    if not biases:
        torch.testing.assert_close(found.scores.double(), expected.scores, atol=1e-4, rtol=1e-4)
    again = selected_scores_reference(*wide, found.indices)
    torch.testing.assert_close(found.scores.double(), again, atol=1e-4, rtol=1e-4)
    assert found.indices.eq(expected.indices).float().mean() > 0.97 or not found.indices.numel()
    assert not found.indices.numel() or found.indices.sort(dim=-1).values.diff(dim=-1).gt(0).all()
    seed = torch.randn(found.scores.shape, generator=torch.Generator().manual_seed(1))
    seed[..., 0] = 0
    gradients = torch.autograd.grad(found.scores, tensors, seed.to(found.scores.dtype))
    for mine, theirs in zip(gradients, torch.autograd.grad(again, wide, seed.double()), strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=1e-4, rtol=1e-4)
    return found


sizes = st.tuples(
    st.sampled_from([1, 2, 3, 4, 7, 12, 40]), st.integers(1, 4), st.booleans(),
    *(st.integers(1, high) for high in (70, 70, 70)), st.integers(1, 20), st.booleans(),
)  # fmt: skip


@settings(max_examples=50)
@given(drawn=sizes)
def check(drawn):
    tokens, heads, shared, n1, n2, half, k, biased = drawn
    tensors = case(tokens, heads, 1 if shared else heads, n1, n2, half)
    make = torch.Generator().manual_seed(2)
    biases = [torch.randn(1 if shared else heads, n, generator=make) for n in (n1, n2)] if biased else ()
    agree(tensors, min(k, n1 * n2), biases)


def test_it_agrees_with_brute_force_at_odd_sizes(path):
    del path
    check()


@pytest.mark.parametrize("key_heads", [1, 3])
@pytest.mark.parametrize("tokens", [2, 60])
def test_any_chunking_gives_the_same(path, monkeypatch, tokens, key_heads):
    del path
    tensors = case(tokens, 3, key_heads, 40, 30, 16)
    whole = agree(tensors, 8)
    monkeypatch.setattr(routed, "BUFFER", 700)
    monkeypatch.setattr(routed, "FEW", 0)
    found = agree(tensors, 8)
    assert torch.equal(found.indices, whole.indices)
    torch.testing.assert_close(found.scores, whole.scores)


def test_few_tokens_go_one_call_and_strides_do_not_matter(compiled, monkeypatch):
    monkeypatch.setattr(kernels, "kernel", lambda: compiled)
    calls = []
    few = routed._few
    monkeypatch.setattr(routed, "_few", lambda *given: calls.append(1) or few(*given))
    queries, first, second = (t.detach() for t in case(3, 2, 2, 40, 30, 16))
    one = route(queries, first, second, 8)
    assert calls == [1]
    strided = queries.transpose(0, 1).contiguous().transpose(0, 1)
    other = route(strided, first, second, 8)
    assert torch.equal(one.indices, other.indices)
    torch.testing.assert_close(one.scores, other.scores)


@pytest.mark.parametrize("tokens", [2, 60])
@pytest.mark.parametrize("heads", [1, 2])
def test_leading_sub_keys_alone_are_a_slice_to_the_bit(path, tokens, heads):
    """Where sub-keys that are kept out follow, leaving them off changes nothing."""
    del path
    queries, first, second = (t.detach() for t in case(tokens, 2, heads, 40, 30, 16))
    bias = torch.randn(heads, 40)
    whole = route(queries, first[:, :25].contiguous(), second, 8, bias[:, :25].contiguous())
    found = route(queries, first[:, :25], second, 8, bias[:, :25])
    assert torch.equal(found.indices, whole.indices) and torch.equal(found.scores, whole.scores)


def test_doubles_and_narrow_parameters():
    tensors = case(3, 2, 2, 6, 5, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: route(*t, 5).scores, tensors)
    queries, first, second = case(20, 2, 1, 20, 15, 8)
    first, second = (t.detach().bfloat16().requires_grad_() for t in (first, second))
    found = route(queries, first, second, 5)
    assert found.scores.dtype == torch.float32
    found.scores.sum().backward()
    assert first.grad.dtype == torch.bfloat16 and queries.grad.dtype == torch.float32
    torch.testing.assert_close(
        found.scores, selected_scores_reference(queries, first.float(), second.float(), found.indices)
    )


def test_the_scores_are_never_there_as_a_whole(compiled, monkeypatch):
    """What is allocated beside the results stays under 1.5 MB for 512 tokens whose scores are 32 MB."""
    monkeypatch.setattr(kernels, "kernel", lambda: compiled)
    tensors = case(512, 8, 8, 1024, 1024, 16)
    made = []
    new_empty = torch.Tensor.new_empty

    def watched(tensor, *shape, **rest):
        made.append(new_empty(tensor, *shape, **rest))
        return made[-1]

    monkeypatch.setattr(torch.Tensor, "new_empty", watched)
    found = route(*tensors, 16)
    results = sum(t.nbytes for t in found[:2])
    largest = max(t.nbytes for t in made if t.shape != found.scores.shape)
    assert results < 1 << 20 and largest * 2 <= 1.5e6


def test_selected_scores_and_their_gradients(path):
    del path
    for heads, key_heads, half in ((3, 1, 70), (3, 3, 17), (1, 1, 128)):
        tensors = case(11, heads, key_heads, 9, 7, half)
        ids = torch.randint(63, (11, heads, 6), generator=torch.Generator().manual_seed(5))
        ids[:, :, 3] = ids[:, :, 0]  # a sub-key retrieved twice gets both gradients
        wide = [t.detach().double().requires_grad_() for t in tensors]
        found, expected = selected_scores(*tensors, ids), selected_scores_reference(*wide, ids)
        torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)
        seed = torch.randn(found.shape)
        both = torch.autograd.grad(found, tensors, seed), torch.autograd.grad(expected, wide, seed.double())
        for mine, theirs in zip(*both, strict=True):
            torch.testing.assert_close(mine.double(), theirs, atol=1e-4, rtol=1e-4)


def test_untouched_sub_keys_are_not_read_and_have_no_gradient(compiled, monkeypatch):
    monkeypatch.setattr(kernels, "kernel", lambda: compiled)
    queries, first, second = case(6, 2, 2, 9, 7, 20)
    ids = torch.randint(3 * 7, (6, 2, 5)) // 7 * 7  # rows 0 to 2, column 0
    with torch.no_grad():
        first[:, 3:], second[:, 1:] = torch.nan, torch.nan
    scores = selected_scores(queries, first, second, ids)
    scores.sum().backward()
    assert scores.isfinite().all() and queries.grad.isfinite().all()
    assert first.grad[:, 3:].eq(0).all() and second.grad[:, 1:].eq(0).all() and first.grad[:, :3].ne(0).any()


def test_a_gradient_of_the_gradient_is_the_references(compiled, monkeypatch):
    monkeypatch.setattr(kernels, "kernel", lambda: compiled)
    tensors = case(12, 2, 2, 9, 7, 5)
    seconds = []
    ids = route(*tensors, 6).indices
    for scores in (route(*tensors, 6).scores, selected_scores(*tensors, ids), selected_scores_reference(*tensors, ids)):
        first = torch.autograd.grad(scores.square().sum(), tensors, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), tensors))
    for mine in seconds[:2]:
        for one, other in zip(mine, seconds[2], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_the_number_of_threads_does_not_change_a_bit(compiled, monkeypatch):
    monkeypatch.setattr(kernels, "kernel", lambda: compiled)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            parts = []
            for tokens, key_heads in ((3, 3), (50, 3), (50, 1)):
                tensors = case(tokens, 3, key_heads, 40, 30, 33)
                ids = torch.randint(1200, (tokens, 3, 16), generator=torch.Generator().manual_seed(0))
                scores = selected_scores(*tensors, ids)
                parts += [scores, *torch.autograd.grad(scores.square().sum(), tensors)]
            found.append(parts)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("tokens", [3, 7, 40])
@pytest.mark.parametrize("key_heads", [1, 3])
def test_sums_over_all_experts_come_along(path, tokens, key_heads):
    """And change nothing else; sub-keys that are kept out do not count."""
    del path
    queries, first, second = tensors = case(tokens, 3, key_heads, 40, 30, 16)
    bias = torch.randn(key_heads, 40).masked_fill(torch.arange(40) > 30, -torch.inf)
    for biases in ((), (bias,)):
        found, plain = route(*tensors, 8, *biases, whole=True), route(*tensors, 8, *biases)
        assert torch.equal(found.scores, plain.scores) and torch.equal(found.indices, plain.indices)
        one, two = half_scores(queries, first, second)
        one = one.masked_fill(bias == -torch.inf, -torch.inf) if biases else one
        sums = (one[..., :, None] + two[..., None, :]).flatten(-2).double()
        torch.testing.assert_close(found.log_partition.double(), sums.logsumexp(-1), atol=1e-4, rtol=1e-4)
        masses = torch.special.entr(sums.softmax(-1)).sum(-1)
        torch.testing.assert_close(found.entropy.double(), masses, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tokens", [3, 40])
def test_candidates_can_be_fewer_than_the_best(tokens):
    queries, first, second = tensors = case(tokens, 2, 2, 40, 30, 16)
    bias = torch.randn(2, 40)
    found = route(*tensors, 8, bias, half_top_k=3)
    one, two = half_scores(queries, first, second)
    rows, columns = ((one + bias).topk(3).indices, two.topk(3).indices)
    assert (found.indices[..., None] // 30 == rows[..., None, :]).any(-1).all()
    assert (found.indices[..., None] % 30 == columns[..., None, :]).any(-1).all()
    assert torch.equal(route(*tensors, 8, bias, half_top_k=9).indices, route(*tensors, 8, bias).indices)


def test_what_a_compiler_sees_is_the_same(monkeypatch):
    """In one piece, without asking for values; the checks of shapes in tests keep torch.compile itself out."""
    tensors = case(12, 2, 2, 20, 15, 8)
    bias = torch.randn(2, 20)
    expected = route(*tensors, 5, bias, whole=True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(routed, "_route", None)
    found = route(*tensors, 5, bias, whole=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    both = [torch.autograd.grad(one.scores.square().sum(), tensors) for one in (found, expected)]
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other)


def test_it_can_be_computed_again_in_the_backward_pass(path):
    del path
    tensors = case(30, 2, 2, 9, 7, 5)
    again = checkpoint(lambda *given: route(*given, 4).scores.square(), *tensors, use_reentrant=False)
    both = [torch.autograd.grad(y.sum(), tensors) for y in (again, route(*tensors, 4).scores.square())]
    for one, other in zip(*both, strict=True):
        assert torch.equal(one, other)


def test_no_tokens_are_no_work():
    tensors = case(0, 2, 2, 9, 7, 5)
    found = agree(tensors, 6)
    assert found.scores.shape == (0, 2, 6)


def test_too_many_are_refused():
    with pytest.raises(ValueError, match="top_k=7: expected 1 to 6"):
        route(*case(2, 1, 1, 2, 3, 4), 7)
