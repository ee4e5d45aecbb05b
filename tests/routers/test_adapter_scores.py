"""Arrow and SpectR against dense linear algebra, which they never do."""

import pytest
import torch
from torch import Tensor

from mixwright.ops.low_rank import product_svd, solve_shifted
from mixwright.routers.arrow import ArrowScores
from mixwright.routers.spectral import SpectralScores

SHAPES = [(7, 12, 3), (12, 7, 5), (5, 4, 9), (33, 21, 1)]


def factors(d_out: int, d_in: int, rank: int, seed: int = 0) -> tuple[Tensor, Tensor, float]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rank, d_in, generator=draw), torch.randn(d_out, rank, generator=draw), 0.25


@pytest.mark.parametrize(("d_out", "d_in", "rank"), SHAPES)
def test_low_rank_svd_equals_the_dense_one(d_out: int, d_in: int, rank: int) -> None:
    down, up, _ = factors(d_out, d_in, rank)
    singular, right = product_svd(up, down)
    _, expected, directions = torch.linalg.svd((up @ down).double(), full_matrices=False)
    kept = min(d_out, d_in, rank)
    assert singular.shape == (rank,)
    assert right.shape == (rank, d_in)
    torch.testing.assert_close(singular[:kept].double(), expected[:kept], atol=1e-5, rtol=1e-5)
    assert singular[kept:].abs().max() < 1e-5 if rank > kept else True
    alignment = (right[:kept].double() * directions[:kept]).sum(-1).abs()
    torch.testing.assert_close(alignment, torch.ones(kept, dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("d_out", "d_in", "rank"), SHAPES)
def test_arrows_direction_is_what_the_adapter_amplifies_most(d_out: int, d_in: int, rank: int) -> None:
    down, up, scale = factors(d_out, d_in, rank)
    (direction,) = ArrowScores.from_lora([(down, up, scale)]).directions
    product = scale * up @ down
    torch.testing.assert_close(direction.norm(), torch.tensor(1.0))
    others = torch.nn.functional.normalize(torch.randn(2000, d_in, generator=torch.Generator().manual_seed(1)), dim=-1)
    assert (product @ direction).norm() >= (others @ product.T).norm(dim=-1).max()
    torch.testing.assert_close((product @ direction).norm(), torch.linalg.matrix_norm(product, 2))


def test_arrow_does_not_know_signs() -> None:
    down, up, scale = factors(7, 12, 3)
    x = torch.randn(20, 12)
    plain = ArrowScores.from_lora([(down, up, scale)])
    for other in ([(-down, up, scale)], [(down, -up, scale)], [(down, up, -scale)]):
        torch.testing.assert_close(ArrowScores.from_lora(other)(x), plain(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plain(-x), plain(x))


def test_arrow_ignores_how_the_product_is_factored() -> None:
    down, up, scale = factors(7, 12, 3)
    turn = torch.randn(3, 3)
    x = torch.randn(20, 12)
    turned = ArrowScores.from_lora([(torch.linalg.inv(turn) @ down, up @ turn, scale)])
    torch.testing.assert_close(turned(x), ArrowScores.from_lora([(down, up, scale)])(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("d_out", "d_in", "rank"), SHAPES)
def test_spectral_scores_are_the_length_of_what_the_expert_adds(d_out: int, d_in: int, rank: int) -> None:
    down, up, scale = factors(d_out, d_in, rank)
    x = torch.randn(9, d_in, generator=torch.Generator().manual_seed(2))
    found = SpectralScores.from_lora([(down, up, scale)])(x)[:, 0]
    torch.testing.assert_close(found, (scale * x @ down.T @ up.T).norm(dim=-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("d_out", "d_in", "rank"), SHAPES)
def test_subspace_scores_are_the_length_of_the_projection(d_out: int, d_in: int, rank: int) -> None:
    down, up, scale = factors(d_out, d_in, rank)
    x = torch.randn(9, d_in, generator=torch.Generator().manual_seed(2))
    projection = torch.linalg.pinv(up @ down) @ (up @ down)
    found = SpectralScores.from_subspace([(down, up, scale)])(x)[:, 0]
    torch.testing.assert_close(found, (x @ projection.T).norm(dim=-1), atol=1e-4, rtol=1e-4)


def test_mixed_ranks_and_a_zero_adapter() -> None:
    entries = [factors(7, 12, 3), None, factors(7, 12, 5, seed=1), (torch.randn(2, 12), torch.zeros(7, 2), 1.0)]
    x = torch.randn(9, 12)
    for make in (ArrowScores.from_lora, SpectralScores.from_lora, SpectralScores.from_subspace):
        whole = make(entries)(x)
        assert whole.isfinite().all()
        torch.testing.assert_close(whole[:, 2], make(entries[2:3])(x)[:, 0], atol=1e-5, rtol=1e-5)
    assert SpectralScores.from_lora(entries)(x)[:, [1, 3]].eq(0).all()
    with pytest.raises(ValueError, match="no expert of the pool adapts this site"):
        ArrowScores.from_lora([None])


@pytest.mark.parametrize("rank", [0, 1, 5, 30])
def test_woodbury_equals_the_dense_solution(rank: int) -> None:
    draw = torch.Generator().manual_seed(rank)
    diagonal = torch.rand(12, dtype=torch.float64, generator=draw) + 0.1
    factor = torch.randn(rank, 12, dtype=torch.float64, generator=draw) if rank else None
    rows = torch.randn(2, 3, 12, dtype=torch.float64, generator=draw)
    dense = diagonal.diag() + (0 if factor is None else factor.T @ factor)
    torch.testing.assert_close(solve_shifted(diagonal, factor, rows), rows @ torch.linalg.inv(dense))
    torch.testing.assert_close(solve_shifted(diagonal, factor, rows[0, 0]), rows[0, 0] @ torch.linalg.inv(dense))
