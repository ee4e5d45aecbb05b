"""The compiled path of single-neuron experts against the reference. Skipped without a C compiler."""

import pytest
import torch
from benchmarks.timing import peak_bytes

from mixwright.ops import kernels
from mixwright.ops.neuron import combine_neurons, neurons_reference
from mixwright.ops.neuron_gradients import Call
from mixwright.ops.neuron_kernel import CompiledPasses
from mixwright.ops.neuron_reference import ACTIVATIONS

from .neuron_cases import agree, both, case


@pytest.fixture(scope="module", autouse=True)
def native(compiled):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "kernel", lambda: compiled)
        yield compiled


@pytest.mark.parametrize("gradient", ["dense", "compact"])
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("width", [1, 7, 64, 96, 768, 1000])
def test_it_is_the_reference_at_odd_widths(width, parts, gradient):
    given = case(width=width, parts=parts, bias=parts > 1, k=7, tokens=5)
    found = both(combine_neurons, *given, dtype=torch.float32, gradient=gradient)
    agree(found, both(neurons_reference, *given), 1e-5)


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_nonlinearity_and_its_slope(activation, parts):
    given = case(tokens=150, width=20, parts=parts, bias=True)
    agree(
        both(combine_neurons, *given, activation=activation, dtype=torch.float32),
        both(neurons_reference, *given, activation=activation),
        1e-5,
    )


@pytest.mark.parametrize(
    ("x_type", "rows_type"), [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32")]
)
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("width", [7, 96])
def test_bfloat16_is_summed_in_float32(width, parts, x_type, rows_type):
    x, rows, weights, indices, bias = case(width=width, parts=parts, bias=parts > 1)
    x, rows = (t.detach().to(getattr(torch, name)).double() for t, name in ((x, x_type), (rows, rows_type)))

    def narrow(x, rows, weights, indices, activation, bias):
        given = x.to(getattr(torch, x_type)), rows.to(getattr(torch, rows_type)), weights, indices
        out = combine_neurons(*given, activation, bias)
        assert out.dtype == given[0].dtype
        return out.to(x.dtype)

    given = (x, rows, weights, indices, bias)
    agree(both(narrow, *given, dtype=torch.float32), both(neurons_reference, *given), 2e-2)
    if x_type == "float32":
        agree(both(narrow, *given, dtype=torch.float32)[:2], both(neurons_reference, *given)[:2], 1e-5)


@pytest.mark.parametrize("width", [7, 96, 200])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_bytes_with_scales_are_the_rows_that_they_stand_for(width, parts, native):
    x, rows, weights, indices, bias = (
        None if t is None else t.detach() for t in case(width=width, parts=parts, bias=parts > 1)
    )
    small = torch.randint(-127, 128, rows.shape, dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    scales = torch.rand(rows.shape[:2], generator=torch.Generator().manual_seed(2)) * width**-0.5 / 64
    call = Call(x.float(), small, weights.float(), indices, None if bias is None else bias.float(), "gelu")
    found = CompiledPasses(native).quantised(call, scales)
    expected = neurons_reference(x, small * scales.double()[..., None], weights, indices, "gelu", bias)
    agree([found], [expected], 1e-5)


def test_rows_without_weight_are_not_read_and_their_weights_have_gradients():
    x, rows, weights, indices, bias = case(dtype=torch.float32, k=9)
    weights = torch.where(indices == 4, 0.0, weights.detach())
    expected = combine_neurons(x, rows, weights, indices, "gelu", bias)
    poisoned = rows.detach().clone()
    poisoned[4] = torch.nan
    assert torch.equal(combine_neurons(x, poisoned, weights, indices, "gelu", bias), expected)
    given = (x, rows, weights.double(), indices, bias)
    found = both(combine_neurons, *given, dtype=torch.float32)
    agree(found, both(neurons_reference, *given), 1e-5)
    assert found[3][weights == 0].any()


def test_nothing_is_read_that_was_not_written(monkeypatch):
    given = case(dtype=torch.float32, parts=3, bias=True)
    expected = both(combine_neurons, *given, dtype=torch.float32)

    def poison(make):
        return lambda *a, **k: (new := make(*a, **k)).fill_(torch.nan if new.is_floating_point() else -7)

    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty_like")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
    for found, one in zip(both(combine_neurons, *given, dtype=torch.float32), expected, strict=True):
        assert torch.equal(found, one)


@pytest.mark.parametrize("tokens", [3, 200])
def test_the_number_of_threads_and_of_tokens_changes_no_bit(tokens):
    given = case(tokens=tokens, width=130, k=40, experts=200)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = both(combine_neurons, *given, dtype=torch.float32)
        torch.set_num_threads(2)
        two = both(combine_neurons, *given, dtype=torch.float32)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    x, rows, weights, indices, _ = (t if t is None or t.dtype == torch.int64 else t.detach().float() for t in given)
    apart = [
        combine_neurons(x[at : at + 7], rows, weights[at : at + 7], indices[at : at + 7], "gelu")
        for at in range(0, tokens, 7)
    ]
    assert torch.equal(torch.cat(apart), one[0])


def test_views_are_taken_as_they_lie():
    x, rows, weights, indices, bias = case(tokens=12, width=40, k=8)
    x, weights = x.detach().T.contiguous().T, weights.detach()[:, :1].expand(-1, 8)
    given = (x, rows, weights, indices.int().T.contiguous().T, bias)
    agree(
        both(combine_neurons, *given, dtype=torch.float32),
        both(neurons_reference, *(t.long() if t is given[3] else t for t in given)),
        1e-5,
    )


def test_memory_beside_the_result_does_not_grow_with_rows_read():
    x, rows, weights, indices, _ = (
        t if t is None or t.dtype == torch.int64 else t.detach().float()
        for t in case(tokens=64, width=512, k=128, experts=600)
    )
    held = peak_bytes(lambda: combine_neurons(x, rows, weights, indices, "gelu"))
    assert held <= x.nbytes + 4096


def test_the_backward_pass_holds_the_rows_that_act_and_a_few_numbers_per_pair():
    x, rows, weights, indices, _ = case(tokens=64, width=512, k=128, experts=600, dtype=torch.float32)

    def step():
        combine_neurons(x, rows, weights, indices, "gelu", gradient="compact").sum().backward()
        x.grad = rows.grad = weights.grad = None

    assert peak_bytes(step) <= 1.1 * rows.nbytes + 4 * x.nbytes + 64 * indices.numel()


def test_it_is_taken_where_it_fits(monkeypatch):
    calls = []
    forward = CompiledPasses.forward
    monkeypatch.setattr(CompiledPasses, "forward", lambda self, *a, **k: calls.append(1) or forward(self, *a, **k))
    for dtype, taken in ((torch.float32, 1), (torch.bfloat16, 1), (torch.float64, 0)):
        x, rows, weights, indices, bias = case(dtype=dtype)
        combine_neurons(x, rows, weights, indices, "gelu", bias)
        assert len(calls) == taken
        calls.clear()
