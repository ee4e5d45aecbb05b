"""First values: the released ones have the measured magnitudes, the matched ones their target variance."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mixwright.experts.factored import AbstractFactored
from mixwright.methods.tensorpoly.config import TensorPolyConfig
from mixwright.methods.tensorpoly.initial import first_factors, first_logits
from mixwright.methods.tensorpoly.latent import assemble, positions
from mixwright.ops.tensor_product import materialise
from mixwright.routing import Condition, Routing

# (d, N) -> leaf products of I, after the norm, RMS of the update for inputs of RMS 1; std of II's A and that RMS
MAGNITUDES: dict[tuple[int, int], tuple[float, float, float, float, float]] = {
    (768, 2): (1.4e-4, 4.6e-2, 1.8e-3, 1.7e-2, 2.1e-3),
    (2048, 2): (5.5e-5, 1.7e-2, 4.2e-4, 1.1e-2, 1.3e-3),
    (5120, 2): (2.2e-5, 6.9e-3, 1.1e-4, 7.0e-3, 8.5e-4),
    (2048, 4): (3.0e-9, 3.0e-4, 1.2e-7, 3.4e-3, 1.2e-4),
    (5120, 4): (4.7e-10, 4.7e-5, 5.1e-9, 2.0e-3, 8.8e-5),
}


def settled(**settings: Any) -> TensorPolyConfig:
    return TensorPolyConfig(tasks=("a",), **settings).settled()


def site(config: TensorPolyConfig, d: int, seed: int = 0) -> tuple[AbstractFactored, list[Tensor]]:
    down, up = first_factors(config, d, d, torch.Generator().manual_seed(seed))
    return assemble(config, down, up, d, d), down


def uniform(config: TensorPolyConfig) -> Tensor:
    apart, latent = positions(config), config.num_latent or 1
    return torch.full((1, latent) if apart is None else (1, apart, latent), 1 / latent)


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def update(experts: AbstractFactored, weights: Tensor, d: int) -> float:
    x = torch.randn(1, 64, d, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return rms(experts(x, Routing(weights[None], experts.num_experts), Condition()))


@pytest.mark.parametrize(("d", "order"), MAGNITUDES)
def test_released_leaves_have_the_measured_magnitudes(d: int, order: int) -> None:
    raw, normed, delta, second, second_delta = MAGNITUDES[d, order]
    config = settled(init="released", order=order)
    experts, down = site(config, d)
    assert rms(materialise(down, d)) == pytest.approx(raw, rel=0.06)
    assert rms(materialise(down, d, norm=True)) == pytest.approx(normed, rel=0.06)
    assert update(experts, uniform(config), d) == pytest.approx(delta, rel=0.1)
    config = settled(init="released", order=order, experts="tensorpoly-2")
    drawn = [site(config, d, seed)[0] for seed in range(3 if order == 2 else 10)]
    with torch.no_grad():
        stds = [rms(experts.factors(uniform(config))[0]) for experts in drawn]
    updates = [update(experts, uniform(config), d) for experts in drawn]
    # The table is of one draw, and at order 4 draws of II differ by a quarter.
    assert sum(stds) / len(stds) == pytest.approx(second, rel=0.1 if order == 2 else 0.2)
    assert sum(updates) / len(updates) == pytest.approx(second_delta, rel=0.1 if order == 2 else 0.35)


def test_released_leaves_are_uniform_within_the_authors_bounds() -> None:
    draw = torch.Generator().manual_seed(0)
    for side in first_factors(settled(init="released", order=4), 2048, 768, draw):
        for leaf in side:
            bound = math.sqrt(1 / 3) / math.sqrt(2048)  # of B as well: the code takes the input's width for both
            assert leaf.abs().max() == pytest.approx(bound, rel=0.02) and leaf.mean().abs() < 0.05 * bound
    xavier = torch.nn.init.xavier_uniform_(torch.empty(2, 8, 16, 28)).std()
    down, up = first_factors(settled(init="released", experts="tensorpoly-2"), 768, 768, draw)
    for leaf in (*down, *up):
        assert leaf.shape == (8, 1, 16, 28)
        assert leaf.std() == pytest.approx(float(xavier), rel=0.05)
    for init, bound in (("released", math.sqrt(1 / 3)), ("matched", 1.0)):
        (down,), (up,) = first_factors(settled(init=init, experts="mhr", heads=4, rank=8), 768, 512, draw)
        assert down.abs().max() == pytest.approx(bound / math.sqrt(768), rel=0.01) and not up.any()


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("factorization", ["ceil", "exact"])
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("tlora", {"num_latent": 3}),
        ("tensorpoly-1", {"num_latent": 4}),
        ("tensorpoly-2", {"num_latent": 4}),
        ("entangled", {"num_latent": 2, "groups": 3}),
    ],
)
def test_a_matched_column_has_the_variance_of_a_lora(
    kind: str, sizes: dict[str, int], factorization: str, order: int
) -> None:
    d = 90
    config = settled(experts=kind, order=order, rank=64, factorization=factorization, **sizes)
    weights = torch.ones(1, sizes["num_latent"]) if kind == "tlora" else uniform(config)
    total = 0.0
    for seed in range(200):
        experts, _ = site(config, d, seed)
        with torch.no_grad():
            down, up = experts.factors(weights)
        assert not up.any(), "the last leaf of B is zero"
        total += float(down.double().square().mean())
    assert total / 200 == pytest.approx(1 / (3 * d), rel=0.05)


@pytest.mark.parametrize("order", [3, 4])
def test_leaves_of_a_long_product_have_one_norm(order: int) -> None:
    down, up = first_factors(settled(order=order), 300, 200, torch.Generator().manual_seed(0))
    for leaf in (*down, *up[:-1]):
        norms = leaf.norm(dim=-1)
        assert norms.max() / norms.min() == pytest.approx(1, abs=1e-5)


def test_logits_start_near_zero() -> None:
    logits = first_logits((50, 2, 8), torch.Generator().manual_seed(0))
    assert 0.9e-3 < logits.abs().max() <= 1e-3 and logits.dtype == torch.float32
