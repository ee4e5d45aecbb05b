from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixwright.data.batches import Batches
from mixwright.data.collate import Batch
from mixwright.methods.phatgoose.config import PhatgooseConfig
from mixwright.methods.phatgoose.recipe import stages
from mixwright.recipe import TrainConfig
from mixwright.training.fit import fit
from mixwright.training.stage import ParamGroup, Stage


class Plane(nn.Module):
    """loss = (a - target)^2 - (b - 3)^2: a descends to the target, b climbs to 3."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(1))
        self.b = nn.Parameter(torch.zeros(1))
        self.frozen = nn.Parameter(torch.ones(1))


def plane_loss(model: Plane, batch: Batch) -> Tensor:
    each = (model.a - batch.targets.float()) ** 2 - (model.b - 3.0) ** 2
    return each.sum()


def numbers(values: Sequence[float], batch_size: int = 2) -> Batches:
    def collate(rows: Sequence[float]) -> Batch:
        return Batch("causal", {}, torch.tensor(rows), len(rows))

    return Batches(values, collate, batch_size=batch_size, seed=0)


def stage(**changes: Any) -> Stage:
    groups = (ParamGroup(select=("a",), lr=0.1), ParamGroup(select=("b",), lr=0.1, maximize=True))
    settings: dict[str, Any] = {"name": "plane", "groups": groups, "steps": 120, "objective": plane_loss, "clip": None}
    return Stage(**(settings | changes))


def test_a_group_that_maximizes_climbs_while_the_other_descends() -> None:
    model = Plane()
    fit(model, stage(), numbers([2.0, 2.0, 2.0]))
    assert model.a.item() == pytest.approx(2.0, abs=0.05)
    assert model.b.item() == pytest.approx(3.0, abs=0.05)
    assert model.frozen.item() == 1.0


def test_a_group_of_split_val_learns_from_held_out_data_only() -> None:
    model = Plane()
    groups = (ParamGroup(select=("a",), lr=0.1, split="val"), ParamGroup(select=("b",), lr=0.1, maximize=True))
    fit(model, stage(groups=groups), numbers([2.0]), validation=numbers([-1.0]))
    assert model.a.item() == pytest.approx(-1.0, abs=0.05)
    assert model.b.item() == pytest.approx(3.0, abs=0.05)
    with pytest.raises(ValueError, match="learns on held-out data; give data.validation"):
        fit(Plane(), stage(groups=groups), numbers([2.0]))


def test_the_first_step_changes_nothing_since_its_rate_is_zero() -> None:
    model = Plane()
    fit(model, stage(steps=1, warmup=1.0), numbers([2.0]))
    assert model.a.item() == 0.0
    fit(model, stage(steps=2, warmup=1.0), numbers([2.0]))
    assert model.a.item() != 0.0


def test_the_loss_is_weighted_by_targets_over_accumulated_passes() -> None:
    def uneven(model: Plane, batch: Batch) -> Tensor:
        return (model.a * batch.targets.float()).sum() + 0 * model.b.sum()

    def collate(rows: Sequence[int]) -> Batch:
        return Batch("causal", {}, torch.tensor([1.0 if r else -4.0 for r in rows]), 3 if rows[0] else 1)

    model, rule = Plane(), stage(objective=uneven, steps=1, warmup=0.0, clip=None)
    batches = Batches([0, 1], collate, batch_size=1, seed=0)
    gradients: list[float] = []
    model.a.register_hook(lambda grad: gradients.append(grad.item()))
    fit(model, rule, batches, config=TrainConfig(accumulate=2))
    assert sorted(gradients) == [-1.0, 0.25]  # each pass divided by the 4 targets of the step


class Joint:
    """An objective that takes two batches at once."""

    at_once = 2

    def __init__(self) -> None:
        self.given: list[int] = []

    def __call__(self, model: Plane, batch: Batch) -> Tensor:
        self.given.append(1)
        return plane_loss(model, batch)

    def together(self, model: Plane, batches: Sequence[Batch]) -> Tensor:
        self.given.append(len(batches))
        return torch.stack([plane_loss(model, batch) for batch in batches]).sum()


def test_an_objective_that_takes_several_batches_is_given_them_and_learns_the_same() -> None:
    joint, plain = Joint(), Plane()
    model = Plane()
    fit(model, stage(objective=joint, steps=3), numbers([2.0, 1.0, 3.0]), config=TrainConfig(accumulate=3))
    fit(plain, stage(steps=3), numbers([2.0, 1.0, 3.0]), config=TrainConfig(accumulate=3))
    assert joint.given == [2, 1] * 3
    torch.testing.assert_close(model.a, plain.a)
    assert model.a.item() != 0.0


def test_the_memory_of_a_gradient_serves_every_step() -> None:
    places: list[int] = []

    def looked_at(model: Plane, batch: Batch) -> Tensor:
        assert model.a.grad is not None and model.a.grad.item() == 0.0
        places.append(model.a.grad.data_ptr())
        kept.append(torch.empty_like(model.a))  # who asked for new memory would get another place
        return plane_loss(model, batch)

    kept: list[Tensor] = []
    fit(Plane(), stage(objective=looked_at, steps=4), numbers([2.0]))
    assert len(places) == 4 and len(set(places)) == 1


def test_a_loss_that_is_not_finite_stops_with_weights_and_checkpoint_intact(tmp_path: Path) -> None:
    seen: list[int] = []

    def breaks(model: Plane, batch: Batch) -> Tensor:
        seen.append(1)
        return plane_loss(model, batch) * (float("nan") if len(seen) > 5 else 1.0)

    model = Plane()
    with pytest.raises(ValueError, match=r"stage plane, step 5: the train loss is nan.*lower the learning rate"):
        fit(model, stage(objective=breaks), numbers([2.0]), folder=tmp_path / "run")
    assert torch.isfinite(model.a).all()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000005"]


def test_a_step_without_targets_names_its_rows() -> None:
    def empty(rows: Sequence[float]) -> Batch:
        return Batch("causal", {}, torch.tensor(rows), 0, where=("a.jsonl:7",))

    with pytest.raises(ValueError, match=r"step 0: no token of its train examples counts \(a.jsonl:7\)"):
        fit(Plane(), stage(), Batches([1.0], empty, batch_size=1, seed=0))


def test_no_examples_is_an_error() -> None:
    with pytest.raises(ValueError, match="the data set is empty"):
        numbers([])


def test_the_best_step_is_kept_the_untrained_one_included_and_ties_go_to_the_later() -> None:
    model = Plane()
    rule = stage(choose_every=5, steps=20, warmup=0.0)
    fitted = fit(model, rule, numbers([2.0]), validation=numbers([-2.0]))
    assert fitted.best is not None and fitted.best[0] == 0 and model.a.item() == 0.0
    model = Plane()
    flat = stage(choose_every=5, steps=20, warmup=0.0, objective=lambda m, b: (m.a + m.b).sum() * 0.0)
    fitted = fit(model, flat, numbers([2.0]), validation=numbers([2.0]))
    assert fitted.best == (20, 0.0)


def test_fit_leaves_modes_flags_and_the_global_random_state_as_they_were() -> None:
    model = Plane().eval()
    model.b.requires_grad_(False)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    fit(model, stage(steps=2), numbers([1.0]))
    assert torch.equal(torch.rand(3), expected)
    assert not model.training and not model.b.requires_grad and model.a.requires_grad and model.a.grad is None


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_and_leaves_float32_weights(
    precision: Any, backbone: Callable[..., nn.Module], batches: Callable[..., Batches]
) -> None:
    model = backbone("causal")
    rule = Stage(name="all", groups=(ParamGroup(select=("*",), lr=1e-2),), steps=12, warmup=0.0)
    fitted = fit(model, rule, batches("causal"), config=TrainConfig(precision=precision))
    assert fitted.losses[-1] < fitted.losses[0] and {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_backbone_of_low_precision_is_trained_on_in_its_own(
    backbone: Callable[..., nn.Module], batches: Callable[..., Batches], small: PhatgooseConfig
) -> None:
    low, trained = backbone("causal").bfloat16(), None
    for stage in stages(small):
        model = stage.build(low, 0, trained)
        fitted = fit(model, stage, batches("causal"))
        trained = stage.harvest(model)
        model.remove()
        assert torch.isfinite(torch.tensor(fitted.losses)).all()
    assert {factor[0].dtype for factor in trained.factors.values()} == {torch.float32}
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", ["causal", "seq2seq", "encoder"])
def test_each_kind_learns_its_toy_task(
    kind: str, optimizer: Any, backbone: Callable[..., nn.Module], batches: Callable[..., Batches]
) -> None:
    rule = Stage(name="all", groups=(ParamGroup(select=("*",), lr=1e-2),), steps=40, warmup=0.0, optimizer=optimizer)
    fitted = fit(backbone(kind), rule, batches(kind, batch_size=8))
    assert sum(fitted.losses[-5:]) < 0.6 * sum(fitted.losses[:5])


class Remembering(Plane):
    """Keeps what it built from `a` in eval mode for as long as the parameter's version says that nothing changed."""

    def __init__(self) -> None:
        super().__init__()
        self.built: tuple[int, float] | None = None

    def doubled(self) -> Tensor:
        if self.training:
            return 2 * self.a
        if self.built is None or self.built[0] != self.a._version:
            self.built = (self.a._version, 2 * self.a.item())
        return torch.full_like(self.a, self.built[1])


def doubled_loss(model: Remembering, batch: Batch) -> Tensor:
    return ((model.doubled() - batch.targets.float()) ** 2).sum() + 0 * model.b.sum()


def test_whoever_remembers_what_was_built_hears_that_the_best_weights_are_back() -> None:
    model = Remembering()
    rule = stage(objective=doubled_loss, choose_every=5, steps=20, warmup=0.0)
    fitted = fit(model, rule, numbers([2.0]), validation=numbers([-2.0]))
    assert fitted.best is not None and fitted.best[0] == 0 and model.a.item() == 0.0
    assert model.eval().doubled().item() == 2 * model.a.item()


def test_whoever_remembers_what_was_built_hears_of_a_resumed_run(tmp_path: Path) -> None:
    rule = stage(objective=doubled_loss, steps=3, warmup=0.0)
    fit(Remembering(), rule, numbers([2.0]), folder=tmp_path)
    model = Remembering().eval()
    assert model.doubled().item() == 0.0
    fit(model, rule, numbers([2.0]), folder=tmp_path, resume=True)
    assert model.a.item() != 0.0 and model.eval().doubled().item() == pytest.approx(2 * model.a.item())


def test_held_out_losses_are_of_each_task_and_tasks_count_alike(tmp_path: Path) -> None:
    def collate(rows: Sequence[float]) -> Batch:
        return Batch("causal", {}, torch.tensor(rows), len(rows))

    held_out = Batches([1.0, 1.0, 1.0, -1.0], collate, batch_size=2, seed=0, tasks={"up": 3, "down": 1})
    model = Plane()
    rule = stage(groups=(ParamGroup(select=("a",), lr=0.0),), choose_every=2, steps=2)
    fitted = fit(model, rule, numbers([2.0]), validation=held_out, folder=tmp_path)
    assert fitted.held_out == {"up": pytest.approx(1.0 - 9.0), "down": pytest.approx(1.0 - 9.0)}
    with torch.no_grad():
        model.a.fill_(1.0)
    fitted = fit(model, rule, numbers([2.0]), validation=held_out, folder=tmp_path, force=True)
    assert fitted.held_out == {"up": pytest.approx(-9.0), "down": pytest.approx(4.0 - 9.0)}
    assert fitted.best == (2, pytest.approx((-9.0 - 5.0) / 2))  # not -8, the mean over examples
    assert (
        fit(model, rule, numbers([2.0]), validation=held_out, folder=tmp_path, resume=True).held_out == fitted.held_out
    )
