"""The term that pushes experts' masks apart: its value by hand, its gradient, and that it does."""

from dataclasses import replace

import pytest
import torch

from mixwright.experts.overlap import overlap
from mixwright.experts.sparse_deltas import SparseDeltas
from mixwright.methods.smat.config import SmatConfig
from mixwright.methods.smat.diversity_term import diversity_term
from mixwright.methods.smat.episode_loss import EpisodeLoss
from mixwright.methods.smat.model import compose
from mixwright.methods.smat.recipe import groups, stages
from mixwright.methods.smat.sparsity_term import sparsity_term
from mixwright.ops.hard_concrete import DEAD
from mixwright.training.optimizers import make_optimizers, set_rate
from mixwright.training.stage import select_parameters

from .test_episode_loss import Net, _episode, _model


def _deltas(logits: torch.Tensor) -> SparseDeltas:
    """Experts over two parameters, the second with masks by row, eight weights under each."""
    deltas = SparseDeltas({"a": torch.Size([logits.shape[1] - 2]), "b": torch.Size([2, 8])}, len(logits))
    wide = torch.nn.Parameter(logits[:, :-2].detach().clone())
    deltas.logits["a"], deltas.logits["b"] = wide, torch.nn.Parameter(logits[:, -2:].detach().clone())
    return deltas


def test_its_value_and_gradient_are_those_of_the_formula_by_autograd() -> None:
    logits = 2 * torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[:2] += 3 * torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    deltas = _deltas(logits)
    leaf = logits.clone().requires_grad_()
    size = torch.tensor([1.0] * 7 + [8.0] * 2, dtype=torch.float64)
    q, share = torch.sigmoid(leaf - DEAD), size / size.sum()
    pairs = [
        (share * q[m] * q[n]).sum() / ((share * q[m]).sum() * (share * q[n]).sum()) - 1
        for m in range(4)
        for n in range(m)
    ]
    assert {bool(pair > 0) for pair in pairs} == {True, False}
    expected = torch.stack([pair.clamp_min(0) for pair in pairs]).mean()
    found = diversity_term(deltas)
    torch.testing.assert_close(found, expected)
    expected.backward()
    found.backward()
    assert leaf.grad is not None
    together = torch.cat([deltas.logits_of(name).grad for name in ("a", "b")], 1)  # type: ignore[misc]
    torch.testing.assert_close(together, leaf.grad, rtol=1e-9, atol=1e-12)
    assert all(delta.grad is None for delta in deltas.delta.values()) and deltas.multipliers.grad is None


@torch.no_grad()
def test_it_is_over_zero_for_masks_alike_and_zero_by_chance_and_apart() -> None:
    near, far = torch.full((1, 50), 3.0), torch.full((1, 50), -4.0)
    alike = _deltas(torch.cat([torch.cat([near, far], 1)] * 2))
    apart = _deltas(torch.cat([torch.cat([near, far], 1), torch.cat([far, near], 1)]))
    flat = _deltas(torch.full((3, 100), 0.3))
    assert float(diversity_term(alike)) > 0.3 and float(diversity_term(apart)) == 0
    assert float(diversity_term(flat)) == pytest.approx(0, abs=1e-6)
    assert float(diversity_term(_deltas(near))) == 0


def _trained(diversity: float) -> SparseDeltas:
    """Experts that begin alike, under the constraint and this term alone, at the recipe's rates."""
    config = SmatConfig(experts=3, sparsity=0.8, steps=500, feature_width=12, diversity=diversity)
    model = compose(config, [Net()])
    model.mixture.experts = deltas = SparseDeltas({"w": torch.Size([4000])}, 3)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        same = torch.randn(1, 4000, generator=draw)
        deltas.logits["w"].copy_(0.5 * same + 0.05 * torch.randn(3, 4000, generator=draw))
    chosen = tuple(group for group in groups(config, model) if group.name in ("masks", "multipliers"))
    stage = replace(stages(config)[0], groups=chosen)
    optimizers = make_optimizers(model, stage, select_parameters(model, chosen))
    for step in range(500):
        set_rate(optimizers, stage.rate(step))
        deltas.zero_grad()
        loss = sparsity_term(deltas, torch.full((1, 3), 1 / 3), 0.8, 0.0)
        (loss + diversity * diversity_term(deltas)).backward()
        for optimizer in optimizers:
            optimizer.step()
        deltas.after_step()
    return deltas


def test_experts_that_begin_alike_end_apart_and_as_sparse_as_they_shall_be() -> None:
    without, with_it = overlap(_trained(0.0)), overlap(_trained(0.3))
    assert float(without.iou[0, 1]) > 4 * float(without.chance[0, 1])
    assert float(with_it.iou[0, 1]) < 1.5 * float(with_it.chance[0, 1])
    assert bool(((with_it.density > 0.15) & (with_it.density < 0.21)).all())


def test_the_loss_of_an_episode_has_it_at_its_weight_and_not_at_zero() -> None:
    config = SmatConfig(experts=3, seed=0)
    model = _model(config)
    with torch.no_grad():
        for logits in model.deltas.logits.values():
            logits.copy_(3 * torch.randn_like(logits[:1]).expand_as(logits))

    def loss(diversity: float) -> torch.Tensor:
        torch.manual_seed(0)
        return EpisodeLoss(replace(config, diversity=diversity))(model, _episode())

    torch.testing.assert_close(loss(0.5) - loss(0.0), 0.5 * diversity_term(model.deltas), atol=1e-5, rtol=0)
    assert float(diversity_term(model.deltas).detach()) > 0.1


def test_each_episode_of_an_update_counts_it_once() -> None:
    config = SmatConfig(experts=3)
    model = _model(config)
    with torch.no_grad():
        for logits in model.deltas.logits.values():
            logits.copy_(3 * torch.randn_like(logits[:1]).expand_as(logits))

    def loss(diversity: float) -> torch.Tensor:
        torch.manual_seed(0)
        return EpisodeLoss(replace(config, diversity=diversity)).together(model, [_episode()] * 3)

    torch.testing.assert_close(loss(0.5) - loss(0.0), 3 * 0.5 * diversity_term(model.deltas), atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", [{"masks": "random"}, {"changes": "own"}, {"experts": 1}])
def test_masks_that_do_not_learn_are_not_pushed(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="diversity"):
        SmatConfig(**{"diversity": 0.1, **settings})  # type: ignore[arg-type]
