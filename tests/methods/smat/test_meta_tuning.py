"""Meta-tuning as a whole: P>M>F as a special case, the constraint, killed runs, and what is watched."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, normalize

import mixwright as mw
from mixwright.data.batches import Batches
from mixwright.data.episodes import Episode
from mixwright.data.order import Order
from mixwright.experts.sparse_deltas import SparseDeltas
from mixwright.methods.smat.config import SmatConfig
from mixwright.methods.smat.fresh import set_masks
from mixwright.methods.smat.model import FewShotModel, compose
from mixwright.methods.smat.recipe import groups, stages
from mixwright.methods.smat.sparsity_term import sparsity_term
from mixwright.methods.smat.watch import Watch
from mixwright.ops.hard_concrete import LIMIT
from mixwright.recipe import TrainConfig
from mixwright.routing import Routing
from mixwright.training.fit import fit
from mixwright.training.optimizers import make_optimizers, set_rate
from mixwright.training.stage import Stage, select_parameters

from .test_episode_loss import Net

PLAIN = {"experts": 1, "masks": "all", "distillation": 0.0, "inner_rate": 0.0}
"""P>M>F, as a recipe says it."""


def _episode(index: int) -> Episode:
    draw = torch.Generator().manual_seed(index)
    shapes = torch.randn(3, 3, 16, 16, generator=draw)
    images = shapes.repeat(4, 1, 1, 1) + 0.8 * torch.randn(12, 3, 16, 16, generator=draw)
    return Episode(images[:6], torch.arange(6) % 3, images[6:], torch.arange(6) % 3)


def _batches() -> Batches:
    def collate(rows: Sequence[Any]) -> Any:
        return _episode(rows[0])

    return Batches(range(500), collate, batch_size=1, seed=0, order=Order(500, 0), digest="waves")


def _ready(config: SmatConfig) -> tuple[FewShotModel, Stage]:
    model = compose(replace(config, feature_width=12), [Net()])
    (stage, *_) = stages(config)
    return model, replace(stage, groups=groups(config, model))


def test_one_expert_with_full_masks_is_plain_meta_tuning_step_for_step() -> None:
    config = SmatConfig(**PLAIN, steps=8, learning_rate=0.05, weight_decay=0.01)  # type: ignore[arg-type]
    model, stage = _ready(config)
    assert [group.name for group in stage.groups] == ["shared change"]
    fit(model, stage, _batches(), config=TrainConfig(accumulate=2))
    theta = model.weights_for(Routing(torch.ones(1), 1))

    net = Net()
    change = {name: torch.zeros_like(p, requires_grad=True) for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD(change.values(), lr=0.05, momentum=0.9, weight_decay=0.01)
    batches = _batches()
    for step in range(8):
        warm, fall = min(1.0, step / int(0.1 * 8)) if int(0.1 * 8) else 1.0, min(1.0, (8 - step) / int(0.9 * 8))
        optimizer.param_groups[0]["lr"] = 0.05 * min(warm, (1 - math.cos(math.pi * fall)) / 2)
        optimizer.zero_grad(set_to_none=False)
        for micro in (2 * step, 2 * step + 1):
            episode = batches.batch(micro)
            weights = {n: p.detach() + change[n] for n, p in net.named_parameters()}
            support = functional_call(net, weights, (episode.support,))
            head = torch.stack([support[episode.labels == c].mean(0) for c in range(3)])
            queries = functional_call(net, weights, (episode.query,))
            logits = 10 * normalize(queries, dim=-1) @ normalize(head, dim=-1).T
            (cross_entropy(logits, episode.query_labels) / 2).backward()
        for delta in change.values():
            delta.grad = torch.zeros_like(delta) if delta.grad is None else delta.grad
        optimizer.step()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(theta[name], parameter.detach() + change[name].detach(), rtol=1e-5, atol=1e-7)
    assert change["out.weight"].abs().max() > 1e-3


@pytest.mark.parametrize(("weights", "experts", "sparsity"), [(1000, 8, 0.9), (20_000, 2, 0.8), (4000, 16, 0.9)])
def test_the_constraint_is_met_within_the_budget_whatever_the_size_of_the_pool(
    weights: int, experts: int, sparsity: float
) -> None:
    """The task's loss is off; rates are those of the recipe, the number of steps is a twenty-fifth of the paper's."""
    steps = 500
    config = SmatConfig(experts=experts, sparsity=sparsity, steps=steps, feature_width=12)
    model = compose(config, [Net()])
    model.mixture.experts = deltas = SparseDeltas({"w": torch.Size([weights])}, experts)
    chosen = tuple(group for group in groups(config, model) if group.name in ("masks", "multipliers"))
    stage = replace(stages(config)[0], groups=chosen)
    optimizers = make_optimizers(model, stage, select_parameters(model, chosen))
    draw = torch.Generator().manual_seed(0)
    for step in range(steps):
        set_rate(optimizers, stage.rate(step))
        deltas.zero_grad()
        before, kept = deltas.multipliers.detach().clone(), deltas.sparsity() > sparsity
        alpha = torch.softmax(torch.randn(4, experts, generator=draw), -1).mean(0)
        sparsity_term(deltas, alpha[None], sparsity, config.floor).backward()
        for optimizer in optimizers:
            optimizer.step()
        deltas.after_step()
        assert bool((deltas.multipliers[kept] == 0).all())
        assert bool((deltas.multipliers >= before)[~kept].all())
    assert (deltas.sparsity() - sparsity).abs().max() <= 0.01


def test_an_expert_that_nobody_chooses_gets_sparse_all_the_same() -> None:
    deltas = SparseDeltas({"w": torch.Size([50])}, 3)
    nn.init.ones_(deltas.multipliers)
    alone = torch.tensor([1.0, 0.0, 0.0])
    for floor, expected in ((0.1, True), (0.0, False)):
        deltas.zero_grad()
        sparsity_term(deltas, alone[None], 0.9, floor).backward()
        grad = deltas.logits["w"].grad
        assert grad is not None and bool((grad[2].abs() > 0).all()) == expected


def test_while_multipliers_are_zero_masks_are_not_asked_and_a_met_constraint_has_no_gradient() -> None:
    deltas = SparseDeltas({"w": torch.Size([50])}, 2)
    sparsity_term(deltas, torch.tensor([[0.5, 0.5]]), 0.9, 0.1).backward()
    assert deltas.logits["w"].grad is None and deltas.multipliers.grad is not None
    assert bool((deltas.multipliers.grad > 0).all())
    deltas.zero_grad()
    term = sparsity_term(deltas, torch.tensor([[0.5, 0.5]]), 0.0, 0.1)
    term.backward()
    assert bool((deltas.multipliers.grad <= 0).all())


def test_rates_grow_with_the_masks_and_with_the_hurry() -> None:
    config = SmatConfig(feature_width=12)
    model = compose(config, [Net()])
    units = sum(p.numel() for p in Net().parameters())
    by_name = {group.name: group for group in groups(config, model)}
    assert by_name["masks"].lr == pytest.approx(0.046 * units)
    assert by_name["multipliers"].lr == 2e-3 and by_name["multipliers"].optimizer == "dual_ascent"
    assert (by_name["shared change"].optimizer, by_name["shared change"].momentum) == ("sgd", 0.9)
    assert (by_name["masks"].momentum, by_name["masks"].clip, by_name["router"].clip) == (0.0, 5.0, 1.0)
    assert by_name["router"].weight_decay == 0.01 and by_name["masks"].weight_decay == 0.0
    quick = {group.name: group for group in groups(replace(config, steps=125), model)}
    assert quick["masks"].lr == pytest.approx(100 * by_name["masks"].lr)
    assert quick["multipliers"].lr == pytest.approx(100 * 2e-3) and quick["router"].lr == by_name["router"].lr


def test_rates_fall_by_half_a_cosine() -> None:
    stage = stages(SmatConfig(steps=100))[0]
    assert [round(stage.rate(step), 6) for step in (0, 5, 10, 55, 100)] == [0.0, 0.5, 1.0, 0.5, 0.0]


@pytest.mark.parametrize("masks", ["all", "random", "given"])
def test_masks_that_nobody_learns_stay_as_they_are(masks: str) -> None:
    config = SmatConfig(experts=2, masks=masks, steps=3, learning_rate=0.05, sparsity=0.75)  # type: ignore[arg-type]
    model, stage = _ready(config)
    if masks == "given":
        chosen = {"out.weight": torch.eye(12), "stem.bias": torch.ones(12)}
        set_masks(model.deltas, chosen, expert=0)
        with pytest.raises(ValueError, match=r"masks\['out.weight'\]: \(3,\); expected \(12, 12\)"):
            set_masks(model.deltas, {"out.weight": torch.ones(3)})
        total = sum(p.numel() for p in Net().parameters())
        assert model.sparsity().tolist() == pytest.approx([1 - 24 / total, 0.0], abs=1e-6)
    else:
        assert model.sparsity().tolist() == pytest.approx([0.0 if masks == "all" else 0.75] * 2, abs=0.05)
    before = {name: logits.detach().clone() for name, logits in model.deltas.logits.items()}
    fit(model, stage, _batches())
    assert all(torch.equal(model.deltas.logits[name], logits) for name, logits in before.items())
    assert model.deltas.delta["out/weight"].abs().sum() > 0
    assert bool((model.deltas.multipliers == 0).all())


def test_a_uniform_mixture_asks_no_router_and_stays_uniform_when_loaded(tmp_path: Path) -> None:
    config = SmatConfig(experts=4, router="uniform", steps=2, from_pretrained=False, feature_width=12)
    model, stage = _ready(config)
    assert "router" not in {group.name for group in stage.groups}
    fit(model, stage, _batches())
    episode = _episode(0)
    assert model.eval().routing(episode.support_set).weights.tolist() == [0.25] * 4


def test_soft_merging_trains_a_change_for_each_expert(tmp_path: Path) -> None:
    config = SmatConfig(experts=3, changes="own", steps=3, learning_rate=0.05, feature_width=12)
    model, stage = _ready(config)
    assert {group.name for group in stage.groups} == {"shared change", "router"}
    fit(model, stage, _batches())
    change = model.mixture.experts.delta["out/weight"]
    assert change.shape == (3, 12, 12) and bool((change.flatten(1).abs().sum(1) > 0).all())
    model.eval().save_pretrained(tmp_path / "pool")
    again = mw.load(tmp_path / "pool", backbone=Net())
    assert torch.equal(again.mixture.experts.delta["out/weight"], change)


def test_hand_masks_are_globs() -> None:
    model, _ = _ready(SmatConfig(**PLAIN, include=("*bias",)))  # type: ignore[arg-type]
    assert model.deltas.names == ("stem.bias", "norm.bias", "out.bias", "unread.bias")
    assert all(logits.shape == (1,) for logits in model.deltas.logits.values())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_runs_go_on_to_the_same_bits(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).parent / "kill_harness.py"), str(tmp_path), "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["killed"] == 3 and found["unequal"] == [] and found["moved"]


def _filled(model: FewShotModel, value: Any) -> None:
    with torch.no_grad():
        for logits in model.deltas.logits.values():
            logits.copy_(value(logits))


def test_what_is_watched_has_known_values_at_known_states() -> None:
    config = SmatConfig(experts=2, feature_width=12, sparsity=0.5)
    model, watch = compose(config, [Net()]), Watch(config)
    _filled(model, lambda logits: torch.full_like(logits, LIMIT))
    watch.note(torch.tensor([0.5, 0.5]))
    numbers = watch.look(model)
    assert numbers["sparsity.min"] == 0 and numbers["masks.fractional"] == 0
    assert numbers["experts.overlap"] == pytest.approx(1.0) and numbers["routing.entropy"] == pytest.approx(1.0)
    half = [torch.rand(1 << 12) < 0.5 for _ in range(2)]
    model.mixture.experts = SparseDeltas({"w": torch.Size([1 << 12])}, 2)
    for other, expected in ((half[0], 3.0), (half[1], 1.0), (~half[0], 0.0)):
        _filled(model, lambda logits, other=other: torch.where(torch.stack([half[0], other]), LIMIT, -LIMIT))
        assert watch.look(model)["experts.overlap"] == pytest.approx(expected, abs=0.1)
    for weights in ([1.0, 0.0], [0.0, 1.0]):
        watch.note(torch.tensor(weights))
    numbers = watch.look(model)
    assert numbers["routing.usage"] == pytest.approx(1.0) and numbers["routing.entropy"] == pytest.approx(0.0)
    assert "routing.usage" not in watch.look(model)


def test_alarms_say_what_is_wrong_when_it_is() -> None:
    config = SmatConfig(experts=2, feature_width=12, sparsity=0.5)
    model, watch = compose(config, [Net()]), Watch(config)
    model.router.progress = 0.5
    assert watch.alarms(watch.look(model)) == {}  # dense masks are young
    model.router.progress = 0.9
    assert list(watch.alarms(watch.look(model))) == ["an expert stays dense"]
    _filled(model, lambda logits: torch.full_like(logits, -LIMIT))
    assert list(watch.alarms(watch.look(model))) == ["dead masks"]
    for _ in range(25):
        watch.note(torch.tensor([0.99, 0.01]))
    assert "routing collapses" in watch.alarms(watch.look(model))
    assert watch.alarms({"routing.least": 0.5}) == {}


def test_the_sparsity_that_is_asked_for_may_rise() -> None:
    config = SmatConfig(sparsity=0.8, annealed=0.5)
    assert [config.sparsity_at(share) for share in (0.0, 0.25, 0.5, 1.0)] == [0.0, 0.4, 0.8, 0.8]
    assert SmatConfig().sparsity_at(0.0) == 0.9
