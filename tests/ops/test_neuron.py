"""Every path of single-neuron experts against the sum as it is written: values and all gradients."""

import logging

import pytest
import torch

from mixwright.ops import kernels, neuron, neuron_plain
from mixwright.ops.neuron import combine_neurons, neurons_reference
from mixwright.ops.neuron_gradients import combine
from mixwright.ops.neuron_kernel import CompiledPasses
from mixwright.ops.neuron_plain import GATHERED, PlainPasses, neurons_by_matmul
from mixwright.ops.neuron_reference import ACTIVATIONS, activate, neuron_activations

from .neuron_cases import agree, both, case


def plain(x, rows, weights, indices, activation, bias, gradient="dense"):
    return combine(PlainPasses(), x, rows, weights, indices, activation, bias, gradient)


SHAPES = [
    {"width": 1, "k": 1, "experts": 5},
    {"width": 7, "parts": 1},
    {"width": 64, "parts": 3, "bias": True},
    {"width": 96, "bias": True, "k": 130},
    {"tokens": 300, "width": 5},
    {"tokens": 1, "width": 768},
    {"tokens": 2, "width": 1000, "parts": 3},
]


@pytest.mark.parametrize("gradient", ["dense", "compact", "auto"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("few", [1 << 18, 0])
def test_plain_torch_is_the_reference_in_double_precision(shape, gradient, few, monkeypatch):
    monkeypatch.setattr("mixwright.ops.neuron_plain.FEW", few)
    given = case(**shape)
    agree(both(plain, *given, gradient=gradient), both(neurons_reference, *given), 1e-10)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("parts", [2, 3])
def test_plain_torch_passes_gradcheck(activation, parts):
    x, rows, weights, indices, bias = case(tokens=3, width=5, parts=parts, experts=7, k=4, bias=True)
    weights = (weights.detach() + 0.1).requires_grad_()  # a weight of zero leaves its row untouched, from both sides
    given = (x, rows, weights, bias)
    assert torch.autograd.gradcheck(lambda x, r, w, b: combine_neurons(x, r, w, indices, activation, b), given)


def test_a_gradient_has_a_gradient():
    x, rows, weights, indices, bias = case(tokens=3, width=5, experts=7, k=4)
    del bias
    (dx,) = torch.autograd.grad(combine_neurons(x, rows, weights, indices, "silu").sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(neurons_reference(x, rows, weights, indices, "silu").sum(), x, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(dx.sum(), rows), torch.autograd.grad(expected.sum(), rows))


def test_rows_are_gathered_where_torch_has_no_sampled_product(monkeypatch):
    given = case(tokens=30, width=96, parts=3, bias=True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    monkeypatch.setattr("mixwright.ops.neuron_plain.GATHERED", GATHERED >> 8)
    monkeypatch.setattr("mixwright.ops.neuron_plain.FEW", 0)
    agree(both(plain, *given), both(neurons_reference, *given), 1e-10)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_multiplying_the_whole_table_is_the_same_sum(parts):
    given = case(parts=parts, bias=parts > 1)
    agree(both(neurons_by_matmul, *given), both(neurons_reference, *given), 1e-10)


def test_rows_of_few_tokens_are_gathered_at_once(monkeypatch):
    found = []
    gathered = neuron_plain._gathered
    monkeypatch.setattr(neuron_plain, "_gathered", lambda *a: found.append(1) or gathered(*a))
    for tokens in (1, 2):
        x, rows, weights = torch.randn(tokens, 256), torch.randn(400, 2, 256), torch.rand(tokens, 128)
        indices = torch.randint(400, (tokens, 128))
        with torch.no_grad():
            combine(PlainPasses(), x, rows, weights, indices, "gelu", None, "dense")
    assert len(found) == 1


def test_a_small_table_is_multiplied_and_a_large_one_is_not(monkeypatch):
    calls = []
    by_matmul = neuron.neurons_by_matmul
    monkeypatch.setattr(neuron, "neurons_by_matmul", lambda *a: calls.append(len(a[1])) or by_matmul(*a))
    for experts in (8, 4096):
        x, rows, weights, indices, bias = case(tokens=16, experts=experts, k=8)
        combine_neurons(x, rows, weights, indices, "gelu", bias)
    assert calls == [8]


@pytest.mark.parametrize("passes", ["plain", "compiled"])
def test_a_compact_gradient_names_the_rows_that_act_and_no_others(passes, request):
    passes = PlainPasses() if passes == "plain" else CompiledPasses(request.getfixturevalue("compiled"))
    x, rows, weights, indices, bias = case(dtype=torch.float32)
    combine(passes, x, rows, weights, indices, "gelu", bias, "compact").sum().backward()
    acting = indices[weights.detach() != 0].unique()
    assert rows.grad is not None and rows.grad.is_sparse
    assert torch.equal(rows.grad._indices()[0], acting)  # autograd forgets that they are coalesced
    assert rows.grad._values().shape == (len(acting), *rows.shape[1:])


@pytest.mark.parametrize("passes", ["plain", "compiled"])
def test_auto_is_compact_below_half_of_the_rows(passes, request):
    passes = PlainPasses() if passes == "plain" else CompiledPasses(request.getfixturevalue("compiled"))
    for tokens, sparse in ((1, True), (60, False)):
        x, rows, weights, indices, bias = case(tokens=tokens, dtype=torch.float32)
        combine(passes, x, rows, weights, indices, "gelu", bias, "auto").sum().backward()
        assert rows.grad is not None and rows.grad.is_sparse == sparse


@pytest.mark.parametrize("passes", ["plain", "compiled"])
def test_nothing_acts_and_nothing_is_there(passes, request):
    passes = PlainPasses() if passes == "plain" else CompiledPasses(request.getfixturevalue("compiled"))
    x, rows, weights, indices, bias = case(dtype=torch.float32)
    nothing = torch.zeros_like(weights)
    out = combine(passes, x, rows, nothing, indices, "gelu", bias, "compact")
    out.sum().backward()
    assert not out.any() and not x.grad.any() and rows.grad._nnz() == 0
    none = combine_neurons(x[:0], rows, weights[:0], indices[:0], "gelu")
    assert none.shape == (0, x.shape[1])


@pytest.mark.parametrize("passes", ["plain", "compiled"])
@pytest.mark.parametrize("wrong", [-1, 40])
def test_an_id_outside_of_the_table_is_an_error(passes, wrong, request):
    passes = PlainPasses() if passes == "plain" else CompiledPasses(request.getfixturevalue("compiled"))
    x, rows, weights, indices, bias = case(dtype=torch.float32)
    indices[2, 3] = wrong
    with pytest.raises(IndexError, match=f"{wrong}.*the table's 40 experts"):
        combine(passes, x, rows, weights, indices, "gelu", bias, "dense")


def test_autocast_changes_no_sum():
    x, rows, weights, indices, bias = case(dtype=torch.float32)
    expected = combine_neurons(x, rows, weights, indices, "gelu", bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = combine_neurons(x, rows, weights, indices, "gelu", bias)
        narrow = combine_neurons(x.bfloat16(), rows, weights, indices, "gelu", bias)
    assert torch.equal(found, expected) and narrow.dtype == torch.bfloat16


def test_activations_sum_to_the_output():
    x, rows, weights, indices, bias = case(parts=3, bias=True)
    said = neuron_activations(x, rows, indices, "silu", bias)
    out = torch.einsum("tk,tkd->td", said * weights, rows[indices, -1])
    torch.testing.assert_close(out, combine_neurons(x, rows, weights, indices, "silu", bias))
    assert torch.equal(activate(torch.tensor([[2.0]]), "relu_squared"), torch.tensor([4.0]))


def test_one_line_says_that_there_is_no_compiler(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv(kernels.SETTING, "auto")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    x, rows, weights, indices, bias = case(dtype=torch.float32)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            combine_neurons(x, rows, weights, indices, "gelu", bias)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "without their compiled kernel" in said[0]
