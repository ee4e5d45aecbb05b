"""Dots with rows and sums of rows, apart, against the sums as they are written."""

import pytest
import torch
from torch import Tensor

from mixwright.ops import kernels
from mixwright.ops.neuron_kernel import CompiledPasses
from mixwright.ops.row_products import row_dots, row_sums, take_rows


def given(tokens: int = 5, k: int = 4, rows: int = 9, width: int = 7, dtype: torch.dtype = torch.float64):
    torch.manual_seed(tokens + k)
    indices = torch.randint(rows, (tokens, k))
    x, table, weights = torch.randn(tokens, width), torch.randn(rows, width), torch.randn(tokens, k)
    return x.to(dtype), table.to(dtype), weights.to(dtype), indices


def agree(dtype: torch.dtype, tolerance: float, **sizes: int) -> None:
    x, table, weights, indices = given(**sizes, dtype=dtype)
    wide = [t.double().requires_grad_() for t in (x, table, weights)]
    own = [t.clone().requires_grad_() for t in (x, table, weights)]

    def both(x: Tensor, dots: Tensor, sums: Tensor) -> Tensor:
        return (dots.double() * torch.arange(1, 1 + dots.shape[1])).sum() + (sums.double() * x.double()).sum()

    expected = (
        torch.einsum("td,tkd->tk", wide[0], wide[1][indices]),
        torch.einsum("tk,tkd->td", wide[2], wide[1][indices]),
    )
    found = row_dots(own[0], own[1], indices), row_sums(own[2], own[1], indices)
    gradients = torch.autograd.grad(both(wide[0], *expected), wide), torch.autograd.grad(both(own[0], *found), own)
    for one, other in zip((*expected, *gradients[0]), (*found, *gradients[1])):
        torch.testing.assert_close(other.double(), one.detach().double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sizes", [{}, {"tokens": 0}, {"tokens": 300, "k": 3}, {"k": 1, "width": 1}, {"rows": 1}])
def test_they_are_the_sums_as_written_with_their_gradients(sizes: dict[str, int]) -> None:
    agree(torch.float64, 1e-12, **sizes)
    agree(torch.float32, 1e-4, **sizes)


def test_the_compiled_path_is_taken_and_agrees(monkeypatch: pytest.MonkeyPatch, compiled: kernels.Kernels) -> None:
    monkeypatch.setattr(kernels, "kernel", lambda: compiled)
    taken: list[str] = []
    for name in ("forward", "backward", "reduce"):
        plain = getattr(CompiledPasses, name)

        def noted(*arguments: object, name: str = name, plain=plain, **named: object):
            taken.append(name)
            return plain(*arguments, **named)

        monkeypatch.setattr(CompiledPasses, name, noted)
    agree(torch.float32, 1e-4, tokens=40, k=6, rows=30, width=33)
    assert set(taken) == {"forward", "backward", "reduce"}


@pytest.mark.parametrize("compact", [True, False])
def test_taken_rows_that_learn_get_gradients(compact: bool) -> None:
    rows = torch.randn(6, 2, 3, requires_grad=True)
    first, second = take_rows(rows, torch.tensor([1, 3, 4]), torch.tensor([True, False, True]), compact=compact)
    assert torch.equal(first, rows[[1, 3, 4], 0]) and torch.equal(second, rows[[1, 3, 4], 1])
    (gradient,) = torch.autograd.grad(first.sum() + 2 * second.sum(), rows)
    assert gradient.is_sparse == compact
    if compact:
        assert gradient.is_coalesced() and gradient.indices()[0].tolist() == [1, 4]
        gradient = gradient.to_dense()
    expected = torch.zeros(6, 2, 3)
    expected[[1, 4]] = torch.tensor([1.0, 2.0])[:, None].expand(2, 3)
    assert torch.equal(gradient, expected)
