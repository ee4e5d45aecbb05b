"""Tables of fewer bits: how far the layer's output moves, and that nothing moves twice."""

import pytest
import torch

from mixwright.experts.quantised_table import QuantisedTable, dequantise, quantise, quantise_rows
from mixwright.experts.table import NeuronTable
from mixwright.ops import kernels, neuron
from mixwright.ops.neuron import neurons_reference


def layer(parts: int, width: int = 256, n: int = 1024, tokens: int = 64, k: int = 64):
    torch.manual_seed(parts)
    rows = torch.randn(n, parts, width)
    weights = torch.rand(tokens, 8, k // 8).softmax(-1).flatten(1)
    return rows, torch.randn(tokens, width) / width**0.5, weights, torch.randint(n, (tokens, k))


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.detach().double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_eight_bits_move_a_layer_by_about_one_percent_and_bfloat16_by_a_quarter_of_one(
    parts: int, activation: str
) -> None:
    rows, x, weights, indices = layer(parts)
    exact = neurons_reference(x.double(), rows.double(), weights.double(), indices, activation)  # type: ignore[arg-type]
    eight = quantise(NeuronTable(rows))(x, weights, indices, activation)  # type: ignore[arg-type]
    sixteen = NeuronTable(rows.bfloat16())(x, weights, indices, activation)  # type: ignore[arg-type]
    assert eight.dtype == sixteen.dtype == torch.float32
    assert 0.004 < error(eight, exact) < 0.02
    assert 0.001 < error(sixteen, exact) < 0.0045
    # Sums run in float32: what is left to the rounded rows' own sum is float32's error, not bfloat16's.
    rounded = neurons_reference(x.double(), rows.bfloat16().double(), weights.double(), indices, activation)  # type: ignore[arg-type]
    assert error(sixteen, rounded) < 1e-5


def test_each_number_errs_by_half_a_step_at_most() -> None:
    rows = torch.randn(50, 3, 96) * torch.logspace(-6, 6, 50)[:, None, None]
    small, scales = quantise_rows(rows)
    assert small.dtype == torch.int8 and int(small.abs().amax(-1).min()) == 127
    off = (small.double() * scales.double()[..., None] - rows.double()).abs()
    assert bool((off <= 0.5000001 * scales.double()[..., None]).all())
    torch.testing.assert_close(scales, rows.abs().amax(-1) / 127, rtol=2e-5, atol=0)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_dequantised_table_quantises_to_the_same_bits(parts: int) -> None:
    torch.manual_seed(0)
    rows = torch.randn(300, parts, 33) * torch.logspace(-20, 20, 300)[:, None, None]
    rows[7] = 0.0
    bias = torch.randn(300, parts - 1) if parts > 1 else None
    once = quantise(NeuronTable(rows, bias))
    wide = dequantise(once)
    again = quantise(wide)
    assert torch.equal(once.rows, again.rows) and torch.equal(once.scales, again.scales)
    assert torch.equal(dequantise(again).rows, wide.rows) and not wide.rows[7].any()
    assert bias is None or torch.equal(again.bias, bias)  # type: ignore[arg-type]


def test_it_is_the_dequantised_table_and_a_quarter_of_its_bytes() -> None:
    rows, x, weights, indices = layer(2)
    small = quantise(NeuronTable(rows))
    assert torch.equal(small(x, weights, indices, "gelu"), dequantise(small)(x, weights, indices, "gelu"))
    stored = sum(t.numel() * t.element_size() for t in small.state_dict().values())
    assert stored < 0.27 * rows.numel() * 4 and not list(small.parameters())
    assert torch.equal(small.take(torch.tensor([5, 1, 5]))[0], dequantise(small).rows[[5, 1, 5]])


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_the_compiled_path_reads_the_integers_and_agrees(
    parts: int, monkeypatch: pytest.MonkeyPatch, compiled: kernels.Kernels
) -> None:
    rows, x, weights, indices = layer(parts)
    small = quantise(NeuronTable(rows, torch.randn(len(rows), parts - 1) if parts > 1 else None))
    exact = dequantise(small).double()(x.double(), weights.double(), indices, "silu")
    fetched = small(x, weights, indices, "silu")
    monkeypatch.setattr(neuron.kernels, "kernel", lambda: compiled)
    monkeypatch.setattr(QuantisedTable, "fetch", lambda *given: pytest.fail("rows were brought"))
    with torch.no_grad():
        found = small(x, weights, indices, "silu")
    assert error(found, exact.detach()) < 1e-5 and error(fetched, exact.detach()) < 1e-5


def test_tokens_and_weights_have_their_gradients() -> None:
    rows, x, weights, indices = layer(3)
    small = quantise(NeuronTable(rows))
    gradients = []
    for table in (small, dequantise(small)):
        given = x.clone().requires_grad_(), weights.clone().requires_grad_()
        gradients.append(torch.autograd.grad(table(*given, indices, "gelu").square().sum(), given))
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)


def test_what_eight_bits_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantise(NeuronTable(torch.full((4, 2, 3), torch.inf)))
