"""Every path of the dispatch against the formula written token by token: values, gradients, odd sizes, NaN."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixwright.ops.accumulate import add_each, add_grouped, add_lora
from mixwright.ops.dispatch import combine_lora, lora_dense, lora_gathered, lora_grouped, lora_reference
from mixwright.ops.grouped_mm import grouped_mm_fits, lora_grouped_mm

SOURCE = str(Path(__file__).parents[2] / "src")
RETURNING = [lora_gathered, lora_grouped]
ADDING = [add_each, add_grouped, add_lora]


def case(tokens, d_in, d_out, experts, rank, k, seed=0, dtype=torch.float64):
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, d_in, generator=make, dtype=dtype)
    down = torch.randn(experts, rank, d_in, generator=make, dtype=dtype)
    up = torch.randn(experts, d_out, rank, generator=make, dtype=dtype)
    scale = torch.rand(experts, generator=make)
    scores = torch.randn(tokens, experts, generator=make, dtype=dtype)
    values, indices = scores.topk(k, -1)
    return x, down, up, scale, values.softmax(-1), indices


def added(path, arguments, start=0.0):
    x, _, up = arguments[:3]
    out = torch.full((x.shape[0], up.shape[1]), start, dtype=x.dtype)
    with torch.no_grad():
        return path(out, *arguments)


sizes = st.tuples(*(st.integers(low, high) for low, high in ((0, 23), (1, 9), (1, 11), (1, 7), (1, 5)))).flatmap(
    lambda size: st.tuples(st.just(size), st.integers(1, size[3]), st.integers(0, 99))
)


@settings(deadline=None, max_examples=60)
@given(sizes)
def test_all_paths_agree_with_the_reference_at_odd_sizes(drawn):
    (tokens, d_in, d_out, experts, rank), k, seed = drawn
    arguments = case(tokens, d_in, d_out, experts, rank, k, seed)
    expected = lora_reference(*arguments)
    for path in RETURNING:
        torch.testing.assert_close(path(*arguments), expected, atol=1e-10, rtol=1e-10)
    for path in ADDING:
        torch.testing.assert_close(added(path, arguments, 0.5), expected + 0.5, atol=1e-10, rtol=1e-10)
    dense = torch.zeros(tokens, experts, dtype=torch.float64).scatter_add_(-1, arguments[5], arguments[4])
    torch.testing.assert_close(lora_dense(*arguments[:4], dense), expected, atol=1e-10, rtol=1e-10)
    for weights, indices in ((arguments[4], arguments[5]), (dense, None)):
        torch.testing.assert_close(combine_lora(*arguments[:4], weights, indices), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("path", [*RETURNING, combine_lora])
@pytest.mark.parametrize("tokens", [5, 37])
def test_gradients_equal_those_of_the_reference(path, tokens):
    x, down, up, scale, weights, indices = case(tokens, 7, 5, 6, 3, 2)
    weights[1, 1] = 0.0
    inputs = [tensor.requires_grad_() for tensor in (x, down, up, weights)]

    def gradients(function):
        out = function(x, down, up, scale, weights, indices)
        return torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), inputs)

    for found, expected in zip(gradients(path), gradients(lora_reference), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("path", [lora_gathered, lora_grouped])
def test_second_derivatives_exist(path):
    arguments = case(3, 3, 2, 3, 2, 2)
    x = arguments[0].requires_grad_()
    assert torch.autograd.gradgradcheck(lambda value: path(value, *arguments[1:]), x)


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("recorded", [False, True])
def test_an_expert_that_nobody_chose_is_never_touched(tokens, recorded):
    x, down, up, scale, weights, indices = case(tokens, 7, 5, 6, 3, 2)
    indices, weights = indices.clone(), weights.clone()
    indices[indices == 4] = 3
    expected = lora_reference(x, down, up, scale, weights, indices)
    down, up, scale = down.clone(), up.clone(), scale.clone()
    down[4], up[4], scale[4] = torch.nan, torch.nan, torch.nan
    x.requires_grad_(recorded)
    out = combine_lora(x, down, up, scale, weights, indices)
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-10)
    if recorded:
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("path", [*RETURNING, *ADDING])
def test_a_weight_of_zero_leaves_its_expert_alone_whatever_it_holds(path):
    x, down, up, scale, weights, indices = case(20, 7, 5, 6, 3, 2)
    weights = torch.where(indices == 4, 0.0, weights)
    expected = lora_reference(x, down, up, scale, weights, indices)
    down, up = down.clone(), up.clone()
    down[4], up[4] = torch.nan, torch.inf
    arguments = (x, down, up, scale, weights, indices)
    out = added(path, arguments) if path in ADDING else path(*arguments)
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-10)


def test_uninitialised_memory_does_not_leak(monkeypatch):
    arguments = case(50, 9, 9, 6, 3, 2)
    expected = lora_reference(*arguments)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(torch.nan))
    for path in ADDING:
        torch.testing.assert_close(added(path, arguments), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("weights", [[0.0, 1.0, 0.0], [0.5, 0.0, -0.5], [0.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
def test_one_dense_choice_for_all_tokens_leaves_idle_experts_out(weights):
    x, down, up, scale, _, _ = case(6, 7, 5, 3, 2, 2)
    given_weights = torch.tensor(weights)
    full = lora_dense(x, down, up, scale, given_weights.expand(6, 3).double())
    down, up = down.clone(), up.clone()
    down[given_weights == 0], up[given_weights == 0] = torch.nan, torch.nan
    torch.testing.assert_close(combine_lora(x, down, up, scale, given_weights), full, atol=1e-8, rtol=1e-6)


def test_dense_choices_by_row_leave_idle_experts_out():
    x, down, up, scale, _, _ = case(6, 7, 5, 4, 2, 2)
    x = x.view(2, 3, 7)
    table = torch.tensor([[[0.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 0.7, -0.3]]], dtype=torch.float64)
    expected = lora_dense(x, down, up, scale, table)
    down, up = down.clone(), up.clone()
    down[0], up[0] = torch.nan, torch.nan
    torch.testing.assert_close(combine_lora(x, down, up, scale, table), expected, atol=1e-10, rtol=1e-10)


def test_learned_dense_weights_of_zero_have_a_gradient():
    x, down, up, scale, _, _ = case(6, 7, 5, 3, 2, 2)
    weights = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    combine_lora(x, down, up, scale, weights).sum().backward()
    assert weights.grad is not None and (weights.grad != 0).all()


@pytest.mark.parametrize("indexed", [True, False])
def test_onto_adds_in_place_only_where_nothing_is_recorded(indexed):
    arguments = case(8, 7, 5, 6, 3, 2)
    if not indexed:
        dense = torch.zeros(8, 6, dtype=torch.float64).scatter_add_(-1, arguments[5], arguments[4])
        arguments = (*arguments[:4], dense, None)
    base = torch.randn(8, 5, dtype=torch.float64)
    expected = base + combine_lora(*arguments)
    held = base.clone()
    torch.testing.assert_close(combine_lora(*arguments, onto=held), expected, atol=1e-10, rtol=1e-10)
    held = base.clone().requires_grad_()
    combine_lora(*arguments, onto=held).sum().backward()
    assert torch.equal(held.detach(), base) and torch.equal(held.grad, torch.ones_like(base))


def test_decisions_broadcast_against_tokens():
    x, down, up, scale, _, _ = case(6, 7, 5, 4, 2, 2)
    x = x.view(2, 3, 7)
    weights = torch.tensor([[[0.3, 0.7]], [[0.6, 0.4]]], dtype=torch.float64)
    indices = torch.tensor([[[0, 2]], [[3, 1]]])
    expected = lora_reference(
        x.reshape(6, 7), down, up, scale, weights.expand(2, 3, 2).reshape(6, 2), indices.expand(2, 3, 2).reshape(6, 2)
    )
    torch.testing.assert_close(combine_lora(x, down, up, scale, weights, indices).view(6, 5), expected)


def test_paths_work_under_autocast():
    x, down, up, scale, weights, indices = case(40, 8, 8, 4, 2, 2, dtype=torch.float32)
    expected = lora_reference(x, down, up, scale, weights, indices)
    for tokens in (2, 40):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = combine_lora(x[:tokens], down, up, scale, weights[:tokens], indices[:tokens])
        torch.testing.assert_close(out.float(), expected[:tokens], atol=0.3, rtol=0.05)


def test_token_order_does_not_matter():
    x, down, up, scale, weights, indices = case(40, 7, 5, 6, 3, 2)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    out = combine_lora(x, down, up, scale, weights, indices)
    shuffled = combine_lora(x[order], down, up, scale, weights[order], indices[order])
    torch.testing.assert_close(shuffled, out[order], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("idle", [False, True])
def test_the_grouped_operator_agrees_where_torch_has_it(idle):
    x, down, up, scale, weights, indices = case(21, 16, 24, 5, 8, 2, dtype=torch.float32)
    if not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    weights = torch.where(indices == 1, 0.0, weights) if idle else weights
    expected = lora_reference(x, down, up, scale, weights, indices)
    if idle:
        down, up = down.clone(), up.clone()
        down[1], up[1] = torch.nan, torch.nan
    x.requires_grad_()
    out = lora_grouped_mm(x, down, up, scale, weights, indices)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-5)
    (found,) = torch.autograd.grad(out.sum(), x)
    (wanted,) = torch.autograd.grad(lora_grouped(x, down, up, scale, weights, indices).sum(), x)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)
    assert not grouped_mm_fits(x, down, up)
    assert grouped_mm_fits(x.bfloat16(), down.bfloat16(), up.bfloat16())


def test_the_dispatch_compiles_without_a_break():
    # In a process of its own: the shape checks of the test run are what dynamo can't trace.
    script = """
import torch
from mixwright.ops.dispatch import combine_lora, lora_reference
x, down, up = torch.randn(3, 7), torch.randn(6, 3, 7), torch.randn(6, 5, 3)
arguments = (x, down, up, torch.rand(6), torch.rand(3, 2), torch.randint(6, (3, 2)))
with torch.no_grad():
    found = torch.compile(combine_lora, backend="eager", fullgraph=True)(*arguments)
torch.testing.assert_close(found, lora_reference(*arguments), atol=1e-5, rtol=1e-5)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, env={**os.environ, "PYTHONPATH": SOURCE})
