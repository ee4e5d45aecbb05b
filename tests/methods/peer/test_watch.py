"""What is watched in training: the numbers of the usage meter since the last look, and alarms that wait."""

import json
from pathlib import Path

import pytest
import torch

from mixwright.evaluation.neuron_usage import usage
from mixwright.methods.peer.config import PeerConfig
from mixwright.methods.peer.model import compose
from mixwright.methods.peer.watch import Watch

from .neuron_model import batches, neuron_model
from .test_recipe import SMALL, recipe_for, train


def test_the_numbers_are_the_meters_since_the_last_look() -> None:
    model, watch = neuron_model(), Watch()
    assert watch.look(model) == {}
    with torch.no_grad():
        model(**batches(1)[0])
        first = watch.look(model)
        with usage(model) as meter:
            model(**batches(2)[1])
        second = watch.look(model)
    found = meter.usage().values()
    assert first != second
    for name, value in (
        ("used", [one.used for one in found]),
        ("unevenness", [one.unevenness for one in found]),
        ("coverage", [float(one.coverage.mean()) for one in found]),  # type: ignore[union-attr]
    ):
        assert second[f"retrieval.{name}"] == pytest.approx(sum(value) / 2)
    assert second["retrieval.experts"] == 48
    assert watch.look(model) == {}  # nothing passed since
    watch.end()
    assert not any(mixture.router.observers for mixture in model.mixtures.values())


def test_alarms_stand_for_a_while_and_go() -> None:
    model, watch = neuron_model(), Watch(patience=3)
    watch.look(model)
    for mixture in model.mixtures.values():  # everybody meets the same sub-keys
        mixture.router.bias_first[:, 1:] = -100
        mixture.router.bias_second[:, 4:] = -100

    def alarms() -> set[str]:
        with torch.no_grad():
            model(**batches(1)[0])
        return set(watch.alarms(watch.look(model)))

    assert [alarms() for _ in range(4)] == [set(), set(), *[{"collapsed retrieval", "dead sub-keys"}] * 2]
    for mixture in model.mixtures.values():
        mixture.router.bias_first.zero_()
        mixture.router.bias_second.zero_()
    assert alarms() == set()
    assert watch.alarms({}) == {}


def test_they_stand_in_the_log(tmp_path: Path) -> None:
    train(recipe_for(tmp_path, config={**SMALL, "distil_steps": 3}))
    for stage in ("distil", "pretrain"):
        lines = [json.loads(line) for line in (tmp_path / "run" / stage / "log.jsonl").read_text().splitlines()]
        assert all(
            {"retrieval.used", "retrieval.unevenness", "retrieval.coverage"} <= line.keys() for line in lines[1:]
        )
        assert 0 < lines[-1]["retrieval.coverage"] <= 1 and 0 < lines[-1]["retrieval.used"] <= 1


def test_watching_changes_no_weight() -> None:
    model = compose(PeerConfig(num_experts=64, heads=2, top_k=4, dim_key=8), [neuron_model().remove()])
    inputs = batches(1)[0]
    plain = model(**inputs).logits
    watch = Watch()
    watch.look(model)
    assert torch.equal(model(**inputs).logits, plain)
