"""What is watched: numbers of known value at known states, and alarms that say what to do, when due."""

import logging
from pathlib import Path

import pytest
import torch

from mixwright.methods.tensorpoly.task_rows import task_routers
from mixwright.methods.tensorpoly.watch import EVERY, Watch
from mixwright.recipe import TrainConfig
from mixwright.training.fit import fit
from mixwright.training.stage import ParamGroup, Stage

from .teacher import HALVES, knowing, sharp, shots

KINDS = ["poly", "tensorpoly-1", "tensorpoly-2", "entangled"]


def set_logits(model, value):
    with torch.no_grad():
        for router in task_routers(model):
            router.logits.copy_(value(router.logits.shape))


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_routing_that_is_sharp_uniform_or_all_the_same(kind):
    model = knowing(kind)
    numbers = Watch().look(model)
    assert numbers["routing.usage"] == pytest.approx(1.0, abs=1e-3)
    assert numbers["routing.peakiness"] > 0.9 and numbers["routing.sparsity"] == 0.25
    assert numbers["routing.separation"] == pytest.approx(numbers["routing.peakiness"], abs=1e-3)
    assert numbers["routing.discreteness"] < 0.2 and numbers["experts.dead"] == 0.0
    set_logits(model, torch.zeros)
    numbers = Watch().look(model)
    assert [numbers[f"routing.{n}"] for n in ("usage", "peakiness", "separation", "discreteness", "sparsity")] == (
        pytest.approx([1, 0, 0, 1, 0], abs=1e-6)
    )
    set_logits(model, lambda shape: sharp(shape, [2] * 4))
    watch = Watch()
    numbers = watch.look(model)
    assert numbers["routing.usage"] < 0.1 and numbers["routing.separation"] == pytest.approx(0.0, abs=1e-6)
    assert 0.5 < numbers["experts.dead"] <= 0.75
    assert set(watch.alarms(numbers)) == {"one-sided routing", "dead experts"}


def test_an_expert_that_is_nothing_is_dead_and_two_that_undo_each_other_cancel():
    model = knowing("tensorpoly-1")
    set_logits(model, torch.zeros)
    with torch.no_grad():
        for mixture in model.mixtures.values():
            mixture.experts.up[0][3] = 0.0
            mixture.experts.down[0][3] = 0.0
    assert Watch().look(model)["experts.dead"] == 0.25
    with torch.no_grad():
        for mixture in model.mixtures.values():
            for side in (mixture.experts.down, mixture.experts.up):
                for n, leaf in enumerate(side):
                    leaf[2:] = 0.0
                    leaf[1] = (0.98 if n else -1.0) * leaf[0]
    watch = Watch()
    numbers = watch.look(model)
    assert numbers["experts.cancelling"] > 1000
    assert "mostly undo each other; lower learning_rate" in watch.alarms(numbers)["cancelling experts"]


def test_uniform_routing_is_an_alarm_when_it_lasts():
    model = knowing()
    set_logits(model, torch.zeros)
    watch = Watch(patience=3)
    alarms = [set(watch.alarms(watch.look(model))) for _ in range(4)]
    assert alarms == [set(), set(), {"uniform routing"}, {"uniform routing"}]
    set_logits(model, lambda shape: sharp(shape, range(4)))
    assert not watch.alarms(watch.look(model))


def test_what_costs_more_is_looked_at_less_often_and_its_alarm_lasts_meanwhile():
    model = knowing()
    set_logits(model, lambda shape: sharp(shape, [0, 1, 2, 2]))
    watch = Watch()
    looks = [watch.look(model) for _ in range(EVERY + 1)]
    assert ["experts.dead" in numbers for numbers in looks] == [True, *[False] * (EVERY - 1), True]
    assert all("dead experts" in watch.alarms(numbers) for numbers in looks)


@pytest.mark.parametrize("kind", ["lora", "tlora"])
def test_where_nothing_is_chosen_nothing_is_said(kind):
    watch = Watch()
    assert watch.look(knowing(kind)) == {} == watch.alarms({})


def test_a_model_that_is_still_its_backbone_has_no_dead_experts():
    model = knowing("tensorpoly-1")
    with torch.no_grad():
        for mixture in model.mixtures.values():
            mixture.experts.up[-1].zero_()
    numbers = Watch().look(model)
    assert "experts.dead" not in numbers and numbers["routing.usage"] > 0.9


def test_in_training_numbers_are_logged_and_alarms_are_warnings(tmp_path: Path, caplog):
    import json

    model = knowing()
    watch = Watch(patience=1)
    set_logits(model, torch.zeros)
    stage = Stage(
        name="s",
        groups=(ParamGroup(select=("*.experts.*",), lr=1e-3),),
        steps=4,
        watch=watch.look,
        alarms=watch.alarms,
    )
    with caplog.at_level(logging.WARNING), model.with_task("one"):
        fit(model, stage, shots(model, 8, like=HALVES), config=TrainConfig(batch_size=8, log_every=2), folder=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert all("routing.peakiness" in line for line in lines) and "experts.cancelling" in lines[0]
    assert caplog.text.count("tasks share one mixture of experts") == 1
