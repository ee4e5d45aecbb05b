import torch

from mixwright.ops.ridge import ridge, shared_axes


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_an_affine_map_is_found_again() -> None:
    x, weight, bias = 3 * draw(200, 5) + 7, draw(4, 5, seed=1), draw(4, seed=2)
    found, offset = ridge(x.float(), (x @ weight.T + bias).float(), 1e-9)
    torch.testing.assert_close(found, weight, atol=1e-4, rtol=0)
    torch.testing.assert_close(offset, bias, atol=1e-3, rtol=0)


def test_it_is_the_least_of_its_objective_and_the_offset_is_free() -> None:
    x, y, strength = draw(50, 4), draw(50, 3, seed=1) + 5, 0.3
    weight, bias = ridge(x, y, strength)
    scale = (x - x.mean(0)).square().sum(0).mean()

    def objective(w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (x @ w.T + b - y).square().sum() + strength * scale * w.square().sum()

    for seed in range(5):
        step = 1e-2 * draw(3, 4, seed=seed), 1e-2 * draw(3, seed=seed)
        assert objective(weight + step[0], bias + step[1]) > objective(weight, bias)
    far, there = ridge(x, y, 1e9)
    assert float(far.abs().max()) < 1e-6
    torch.testing.assert_close(there, y.mean(0), atol=1e-5, rtol=0)


def test_the_strength_does_not_depend_on_the_scale() -> None:
    x, y = draw(50, 4), draw(50, 3, seed=1)
    torch.testing.assert_close(ridge(1e3 * x, y, 0.1)[0] * 1e3, ridge(x, y, 0.1)[0])


def test_fewer_tokens_than_channels_and_still_channels_are_no_accident() -> None:
    weight, bias = ridge(draw(3, 10), draw(3, 4, seed=1), 1e-2)
    assert weight.isfinite().all() and bias.isfinite().all()
    weight, bias = ridge(torch.ones(8, 3), draw(8, 2), 1e-2)
    assert weight.eq(0).all() and bias.isfinite().all()


def test_shared_axes_keep_the_most_variance_and_lie_as_near_as_a_rotation_allows() -> None:
    x = draw(500, 6) * torch.tensor([5.0, 4.0, 3.0, 0.3, 0.2, 0.1], dtype=torch.float64)
    covariance, towards = x.T @ x / len(x), draw(3, 6, seed=1)
    found = shared_axes(covariance, towards)
    kept, natural = x @ found.T, x @ towards.T
    torch.testing.assert_close(found @ found.T / (found @ found.T)[0, 0], torch.eye(3, dtype=torch.float64))
    back = torch.linalg.lstsq(kept, x).solution
    assert float((kept @ back - x).square().sum() / x.square().sum()) < 0.01  # the plain sum would lose far more
    torch.testing.assert_close(kept.square().sum(), natural.square().sum())
    for seed in range(5):
        turn = torch.linalg.qr(torch.eye(3, dtype=torch.float64) + 0.05 * draw(3, 3, seed=seed)).Q
        assert (kept @ turn - natural).square().sum() >= (kept - natural).square().sum()


def test_a_stream_that_has_room_for_everything_loses_nothing() -> None:
    x = draw(100, 3)
    found = shared_axes(x.T @ x, draw(5, 3, seed=1))
    assert found.shape == (5, 3) and int(torch.linalg.matrix_rank(found)) == 3
