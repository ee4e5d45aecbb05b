"""How mixture weights learn: exponentiated gradient, and groups apart from decay, clipping and the first steps."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixwright.recipe import TrainConfig
from mixwright.routers.mixture_weights import MixtureWeights
from mixwright.routers.routed_weights import RoutedMixtureWeights
from mixwright.routing import Condition
from mixwright.training.exponentiated_gradient import FLOOR, ExponentiatedGradient, plain_rows
from mixwright.training.fit import fit
from mixwright.training.optimizers import make_optimizers
from mixwright.training.stage import ParamGroup, Stage, select_parameters

Make = Callable[..., Any]
COSTS = torch.tensor([0.9, 0.1, 0.5])


class Net(nn.Module):
    """A weight that is to be 2, and a row whose components have costs."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.row = MixtureWeights(3, **options)
        self.slope = nn.Parameter(torch.full((4,), 0.5))


def objective(model: Net, batch: Any) -> Tensor:
    alpha = model.row(torch.zeros(1), Condition()).dense()
    return batch.weight * ((alpha * COSTS).sum() + (model.slope - 2.0).square().sum())


def alpha_group(**settings: Any) -> ParamGroup:
    return ParamGroup(select=("row.logits",), **{"lr": 0.5, **settings})


SLOPE = ParamGroup(select=("slope",), lr=0.1)


def stage(*groups: ParamGroup, **settings: Any) -> Stage:
    return Stage(**{"name": "s", "groups": groups, "steps": 10, "objective": objective, "warmup": 0.0, **settings})


def stepped(weights: MixtureWeights, gradient: Tensor, rate: float = 0.1, steps: int = 1) -> Tensor:
    """`steps` exponentiated gradient steps along the gradient that a loss with d loss / d alpha = `gradient` has."""
    optimizer = ExponentiatedGradient([{"params": [weights.logits], "lr": rate}], {weights.logits: weights})
    for _ in range(steps):
        optimizer.zero_grad()
        (weights(torch.zeros(1), Condition()).dense() * gradient).sum().backward()
        optimizer.step()
    return weights.weights().detach()


def row(*weights: float, temperature: float = 1.0) -> MixtureWeights:
    made = MixtureWeights(len(weights), anneal=(temperature, temperature))
    made.set(torch.tensor(weights))
    return made


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_exponentiated_gradient_is_its_closed_form(temperature: float) -> None:
    start, gradient = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([1.0, -2.0, 0.4])
    found = stepped(row(*start.tolist(), temperature=temperature), gradient)
    expected = start * torch.exp(-0.1 * gradient)
    torch.testing.assert_close(found, expected / expected.sum(), atol=2e-6, rtol=0)


def test_a_constant_added_to_the_gradient_changes_nothing() -> None:
    gradient = torch.tensor([1.0, -2.0, 0.4])
    one, other = (stepped(row(0.2, 0.5, 0.3), gradient + shift) for shift in (0.0, 7.0))
    torch.testing.assert_close(one, other, atol=2e-6, rtol=0)


def test_mass_moves_to_the_smallest_gradient() -> None:
    before, after = torch.tensor([0.2, 0.5, 0.3]), stepped(row(0.2, 0.5, 0.3), torch.tensor([1.0, 2.0, -1.0]))
    assert after[2] > before[2] and after[1] < before[1]
    assert stepped(row(0.2, 0.5, 0.3), torch.tensor([1.0, 2.0, -1.0]), steps=40).argmax() == 2


@pytest.mark.parametrize("gradient", [[1.0, 0.0, -1.0], [1e4, -1e4, 0.0], [0.0, 0.0, 0.0], [1e-8, 0.0, 0.0]])
def test_rows_stay_on_the_simplex_and_no_component_is_lost(gradient: list[float]) -> None:
    weights = row(0.2, 0.5, 0.3)
    found = stepped(weights, torch.tensor(gradient), rate=1.0, steps=300)
    assert found.isfinite().all() and abs(float(found.sum()) - 1) < 1e-6
    assert float(found.min()) > 0.9 * FLOOR
    back = stepped(weights, -torch.tensor(gradient).clamp(-10, 10), rate=1.0, steps=300)
    assert max(gradient) < 1e-7 or back.argmax() != found.argmax()


def test_components_that_are_not_allowed_keep_their_logits() -> None:
    weights = row(0.4, 0.6, 0.0)
    before = weights.logits.detach().clone()
    assert stepped(weights, torch.tensor([1.0, 0.0, -9.0]))[2] == 0
    assert weights.logits[2] == before[2] and weights.logits[0] < before[0]


def test_it_is_what_a_group_asks_for() -> None:
    net = Net()
    asked = stage(alpha_group(optimizer="exponentiated_gradient"), SLOPE)
    adamw, simplex = make_optimizers(net, asked, select_parameters(net, asked.groups))
    assert isinstance(adamw, torch.optim.AdamW) and isinstance(simplex, ExponentiatedGradient)
    assert simplex.param_groups[0]["params"] == [net.row.logits] and len(adamw.param_groups) == 1


@pytest.mark.parametrize("wrong", ["slope", "drawn", "routed"])
def test_it_learns_nothing_but_plain_rows(wrong: str) -> None:
    net: nn.Module = Net(draw="gumbel" if wrong == "drawn" else "none")
    if wrong == "routed":
        net.row = RoutedMixtureWeights(net.row, 4)
        assert not plain_rows(net)
    select = {"slope": "slope", "drawn": "row.logits", "routed": "row.static.logits"}[wrong]
    asked = stage(ParamGroup(select=(select,), lr=0.1, optimizer="exponentiated_gradient"))
    with pytest.raises(ValueError, match=f"{select} can't have optimizer=exponentiated_gradient"):
        make_optimizers(net, asked, select_parameters(net, asked.groups))


def trained(batches: Make, rule: Stage, **options: Any) -> Net:
    net = options.pop("net", None) or Net()
    fit(net, rule, batches("causal"), config=TrainConfig(batch_size=4, checkpoint_every=1, log_every=1), **options)
    return net


@pytest.mark.parametrize("optimizer", ["adamw", "exponentiated_gradient"])
def test_the_loop_finds_the_cheapest_component(optimizer: str, batches: Make) -> None:
    net = trained(batches, stage(alpha_group(optimizer=optimizer), SLOPE, steps=30))
    assert net.row.weights().argmax() == COSTS.argmin() and float(net.row.weights().detach().max()) > 0.6


def test_a_group_has_its_own_weight_decay(batches: Make) -> None:
    def logits(**settings: Any) -> Tensor:
        net = Net()
        net.row.logits.data.copy_(torch.tensor([1.0, 2.0, 3.0]))
        rule = stage(
            alpha_group(**settings), SLOPE, weight_decay=0.5, objective=lambda m, b: b.weight * m.slope.square().sum()
        )
        return trained(batches, rule, net=net).row.logits

    assert torch.equal(logits(weight_decay=0.0), torch.tensor([1.0, 2.0, 3.0]))
    assert logits()[2] < 1.0 and torch.equal(logits(weight_decay=0.5), logits())


def test_a_group_outside_the_clipping_neither_counts_nor_is_clipped(batches: Make) -> None:
    """With plain steps of AdamW the scale is lost, so gradients are read: 1e3 on the row, 3 on the slope."""
    seen: dict[bool, tuple[float, float]] = {}
    for clip in (True, False):

        def steep(model: Net, batch: Any) -> Tensor:
            return batch.weight * (1000 * model.row(torch.zeros(1), Condition()).dense()[0] - 3 * model.slope[0])

        class Spy(Net):
            def norms(self) -> tuple[float, float]:
                assert self.row.logits.grad is not None and self.slope.grad is not None
                return float(self.row.logits.grad.norm()), float(self.slope.grad.norm())

        net = Spy()
        rule = stage(alpha_group(clip=clip), SLOPE, steps=1, objective=steep)
        rule = replace(rule, watch=lambda model, clip=clip: seen.update({clip: model.norms()}) or {})
        trained(batches, rule, net=net)
    together, apart = seen[True], seen[False]
    assert together[0] < 1.0 and together[1] < 0.02
    assert apart[0] > 100 and abs(apart[1] - 1.0) < 1e-3


def test_a_gradient_outside_the_clipping_must_be_finite_too(batches: Make) -> None:
    class Root(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.sum()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] * torch.tensor([1.0, torch.inf, 0.0])

    rule = stage(
        alpha_group(clip=False),
        SLOPE,
        objective=lambda m, b: b.weight * (Root.apply(m.row.logits) + m.slope.sum()),  # type: ignore[no-untyped-call]
    )
    with pytest.raises(ValueError, match="the gradient's norm is nan"):
        trained(batches, rule)


def test_a_delayed_group_is_frozen_and_its_optimiser_sees_nothing(batches: Make) -> None:
    logits: list[Tensor] = []

    def watched(model: Net) -> dict[str, float]:
        logits.append(model.row.logits.detach().clone())
        return {}

    rule = stage(alpha_group(delay=0.4), SLOPE, watch=watched, clip=None)
    delayed = trained(batches, rule)
    assert all(torch.equal(now, torch.zeros(3)) for now in logits[:4]) and not torch.equal(logits[4], logits[3])
    alone = trained(batches, stage(alpha_group(), SLOPE, steps=6, clip=None))
    torch.testing.assert_close(delayed.row.logits, alone.row.logits)  # six steps each, by optimisers without a past
    assert not torch.equal(delayed.slope, alone.slope)
    with pytest.raises(ValueError, match="every group has a delay"):
        trained(batches, stage(alpha_group(delay=0.4)))


def test_held_out_batches_are_not_asked_for_before_their_group_wakes(batches: Make) -> None:
    passes: list[bool] = []

    def counted(model: Net, batch: Any) -> Tensor:
        passes.append(model.row.logits.requires_grad)
        return objective(model, batch)

    rule = stage(alpha_group(split="val", delay=0.5), SLOPE, steps=4, objective=counted)
    trained(batches, rule, validation=batches("causal"))
    assert passes == [False, False, False, True, False, True]


def test_the_temperature_follows_the_training_and_the_kept_weights(batches: Make) -> None:
    temperatures: list[float] = []

    def watched(model: Net) -> dict[str, float]:
        temperatures.append(float(model.row.temperature))
        return {}

    rule = stage(alpha_group(), SLOPE, steps=4, watch=watched)
    net = trained(batches, rule, net=Net(anneal=(1.0, 1 / 16)))
    assert temperatures == [0.5, 0.25, 0.125, 0.0625] == [*temperatures[:-1], float(net.row.temperature)]

    def worse(model: Net, batch: Any) -> Tensor:
        """Held out, the sharp row is the bad one: the first weights are kept, with the temperature they had."""
        return batch.weight * model.row(torch.zeros(1), Condition()).dense().max() + 0 * model.slope.sum()

    rule = stage(alpha_group(lr=1e-9), SLOPE, steps=4, objective=worse, choose_every=1)
    net = Net(anneal=(1.0, 1 / 16))
    net.row.logits.data.copy_(torch.tensor([1.0, 0.0, 0.0]))
    trained(batches, rule, net=net, validation=batches("causal"))
    assert float(net.row.temperature) == 1.0


class Cut(Exception):
    """The power goes."""


@pytest.mark.parametrize("draw", ["gumbel", "dirichlet", "none"])
@pytest.mark.parametrize("optimizer", ["adamw", "exponentiated_gradient"])
def test_a_search_that_was_cut_off_resumes_to_the_same_bits(
    draw: str, optimizer: str, batches: Make, tmp_path: Path
) -> None:
    if optimizer != "adamw" and draw != "none":
        pytest.skip("refused: the gradient is not that of the weights")

    def run(folder: Path, cut: int | None = None, **options: Any) -> Net:
        count: list[int] = []

        def until(model: Net, batch: Any) -> Tensor:
            count.append(1)
            if cut is not None and len(count) > cut:
                raise Cut
            return objective(model, batch)

        group = alpha_group(optimizer=optimizer, delay=0.2, clip=False, weight_decay=0.0)
        rule = stage(group, SLOPE, steps=6, objective=until)
        return trained(batches, rule, net=Net(draw=draw, anneal=(2.0, 0.1)), folder=folder, **options)

    whole, again, other = (
        run(tmp_path / name, **options) for name, options in (("a", {}), ("b", {}), ("c", {"seed": 1}))
    )
    with pytest.raises(Cut):
        run(tmp_path / "cut", cut=3)
    resumed = run(tmp_path / "cut", resume=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor) and torch.equal(again.state_dict()[name], tensor)
    assert torch.equal(other.row.logits, whole.row.logits) == (draw == "none")


def test_settings_of_a_group_are_part_of_what_a_run_is(batches: Make, tmp_path: Path) -> None:
    trained(batches, stage(alpha_group(), SLOPE, steps=1), folder=tmp_path)
    for changed in ({"delay": 0.1}, {"clip": False}, {"weight_decay": 0.0}):
        with pytest.raises(ValueError, match="different run: groups was"):
            trained(batches, stage(alpha_group(**changed), SLOPE, steps=1), folder=tmp_path, resume=True)
