"""Plain SGD, multipliers of constraints, groups with a norm of their own, and what follows a step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixwright.data.batches import Batches
from mixwright.data.collate import Batch
from mixwright.recipe import TrainConfig
from mixwright.training.dual_ascent import DualAscent
from mixwright.training.fit import fit
from mixwright.training.optimizers import make_optimizers
from mixwright.training.stage import ParamGroup, Stage, select_parameters


class Constrained(nn.Module):
    """(x - target)^2 where x <= 1 is asked for: at the optimum of target 3, lambda is 4."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(3))
        self.multiplier = nn.Parameter(torch.zeros(3))


def objective(model: Constrained, batch: Batch) -> Tensor:
    violation = model.x - 1.0
    held = model.multiplier.detach() * violation + (model.multiplier - model.multiplier.detach()) * violation.detach()
    return ((model.x - batch.targets.float().mean()) ** 2 + held).sum() * batch.weight


def numbers(*values: float) -> Batches:
    return Batches(values, lambda rows: Batch("causal", {}, torch.tensor(rows), len(rows)), batch_size=2, seed=0)


X = ParamGroup(select=("x",), lr=0.05, optimizer="sgd", momentum=0.5)
DUAL = ParamGroup(select=("multiplier",), lr=0.2, optimizer="dual_ascent", clip=False)


def stage(*groups: ParamGroup, **settings: Any) -> Stage:
    return Stage(**{"name": "s", "groups": groups, "steps": 40, "objective": objective, "warmup": 0.0, **settings})


def trained(rule: Stage, *values: float, **options: Any) -> Constrained:
    model = options.pop("model", None) or Constrained()
    fit(model, rule, numbers(*values), config=TrainConfig(batch_size=2, checkpoint_every=3, log_every=1), **options)
    return model


def moved(before: list[float], violation: list[float], rate: float = 0.5) -> list[float]:
    multipliers = nn.Parameter(torch.tensor(before))
    multipliers.grad = torch.tensor(violation)
    DualAscent([{"params": [multipliers], "lr": rate}]).step()
    return multipliers.tolist()


def test_multipliers_rise_with_a_violation_restart_without_and_wait_where_nothing_is_said() -> None:
    assert moved([0.0, 1.0, 1.0, 1.0], [2.0, 1.0, -1e-9, 0.0]) == [1.0, 1.5, 0.0, 1.0]
    assert moved([0.0, 0.0], [-5.0, 0.0]) == [0.0, 0.0]


def test_multipliers_without_a_gradient_stay() -> None:
    multipliers = nn.Parameter(torch.ones(2))
    DualAscent([{"params": [multipliers], "lr": 1.0}]).step()
    assert multipliers.tolist() == [1.0, 1.0]


def test_the_loop_presses_until_a_constraint_is_kept_and_forgets_one_that_is() -> None:
    seen: list[tuple[float, float]] = []

    def watched(model: Constrained) -> dict[str, float]:
        seen.append((model.x[0].item(), model.multiplier[0].item()))
        return {}

    trained(stage(X, DUAL, steps=120, watch=watched), 3.0)
    after = [(x, before, now) for (x, before), (_, now) in zip(seen, seen[1:], strict=False)]
    assert all(now >= before if x > 1 else now == 0 for x, before, now in after)
    assert any(x > 2 for x, _ in seen) and any(x < 1 and before > 2 for x, before, _ in after)
    free = trained(stage(X, DUAL, steps=120), 0.5)
    torch.testing.assert_close(free.x.detach(), torch.full((3,), 0.5), atol=1e-3, rtol=0)
    assert free.multiplier.tolist() == [0.0, 0.0, 0.0]


def test_sgd_is_torchs_with_the_groups_momentum_and_decay() -> None:
    rule = stage(X, ParamGroup(select=("multiplier",), lr=0.1, optimizer="sgd", weight_decay=0.3), clip=None, steps=5)
    model, twin = Constrained(), Constrained()
    model.multiplier.data.fill_(2.0)
    twin.load_state_dict(model.state_dict())
    found = trained(rule, 3.0, model=model)
    plain = torch.optim.SGD(
        [
            {"params": [twin.x], "lr": 0.05, "momentum": 0.5},
            {"params": [twin.multiplier], "lr": 0.1, "momentum": 0.0, "weight_decay": 0.3},
        ]
    )
    for _ in range(5):
        plain.zero_grad()
        objective(twin, Batch("causal", {}, torch.tensor([3.0]), 1)).backward()
        plain.step()
    assert torch.equal(found.x, twin.x) and torch.equal(found.multiplier, twin.multiplier)


def test_each_group_has_the_optimiser_it_asks_for() -> None:
    model, rule = Constrained(), stage(X, DUAL)
    sgd, dual = make_optimizers(model, rule, select_parameters(model, rule.groups))
    assert isinstance(sgd, torch.optim.SGD) and isinstance(dual, DualAscent)
    assert sgd.param_groups[0]["params"][0] is model.x and dual.param_groups[0]["params"][0] is model.multiplier


def test_a_group_with_a_norm_of_its_own_is_clipped_by_itself() -> None:
    def steep(model: Constrained, batch: Batch) -> Tensor:
        return batch.weight * (1000 * model.x[0] + 30 * model.multiplier[0])

    def steps(clip: bool | float, limit: float | None) -> tuple[float, float]:
        groups = (
            ParamGroup(select=("x",), lr=1.0, optimizer="sgd", clip=clip),
            ParamGroup(select=("multiplier",), lr=1.0, optimizer="sgd"),
        )
        model = trained(stage(*groups, steps=1, objective=steep, clip=limit), 3.0)
        return -model.x[0].item(), -model.multiplier[0].item()

    assert steps(5.0, 1.0) == pytest.approx((5.0, 1.0), rel=1e-4)
    assert steps(5.0, None) == pytest.approx((5.0, 30.0), rel=1e-4)
    assert steps(1.0, 10.0) == pytest.approx((1.0, 10.0), rel=1e-4)
    assert steps(1e9, 1.0) == pytest.approx((1000.0, 1.0), rel=1e-4)
    assert steps(False, 1.0) == pytest.approx((1000.0, 1.0), rel=1e-4)
    assert steps(True, 1.0)[1] == pytest.approx(0.03, rel=1e-2)


def test_a_group_with_a_norm_of_its_own_must_be_finite_too() -> None:
    rule = stage(
        ParamGroup(select=("x",), lr=1.0, optimizer="sgd", clip=5.0),
        DUAL,
        objective=lambda m, b: b.weight * m.x.sqrt().sum(),
    )
    with pytest.raises(ValueError, match="the gradient's norm is nan"):
        trained(rule, 3.0)


def test_what_a_module_puts_right_is_right_after_every_step() -> None:
    class Bounded(Constrained):
        def after_step(self) -> None:
            self.x.data.clamp_(max=0.5)

    seen: list[float] = []
    steep = ParamGroup(select=("x",), lr=0.5, optimizer="sgd")
    rule = stage(steep, DUAL, steps=4, clip=None, watch=lambda m: seen.append(m.x[0].item()) or {})
    trained(rule, 3.0, model=Bounded())
    assert seen == [0.5] * 4


@pytest.mark.parametrize("cut", [1, 3, 7])
def test_a_run_that_was_cut_off_resumes_to_the_same_bits(cut: int, tmp_path: Path) -> None:
    class Cut(Exception):
        """The power goes."""

    passes: list[int] = []

    def falls(model: Constrained, batch: Batch) -> Tensor:
        passes.append(1)
        if len(passes) > cut:
            raise Cut
        return objective(model, batch)

    rule = {"steps": 9, "clip": 50.0}
    whole = trained(stage(X, DUAL, **rule), 3.0, 2.0, 1.5, folder=tmp_path / "whole")
    with pytest.raises(Cut):
        trained(stage(X, DUAL, objective=falls, **rule), 3.0, 2.0, 1.5, folder=tmp_path / "cut")
    again = trained(stage(X, DUAL, **rule), 3.0, 2.0, 1.5, folder=tmp_path / "cut", resume=True)
    assert whole.multiplier.detach().max() > 0
    assert torch.equal(again.x, whole.x) and torch.equal(again.multiplier, whole.multiplier)


@pytest.mark.parametrize("change", [{"momentum": 0.25}, {"clip": 5.0}])
def test_another_rule_is_another_run(change: dict[str, Any], tmp_path: Path) -> None:
    trained(stage(X, DUAL, steps=2), 3.0, folder=tmp_path)
    other = ParamGroup(**{"select": ("x",), "lr": 0.05, "optimizer": "sgd", "momentum": 0.5, **change})
    with pytest.raises(ValueError, match="different run: groups"):
        trained(stage(other, DUAL, steps=2), 3.0, folder=tmp_path, resume=True)
