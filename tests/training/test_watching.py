"""What a stage watches stands in its log beside the loss; an alarm is heard when it sets in."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mixwright.data.batches import Batches
from mixwright.data.collate import Batch
from mixwright.recipe import TrainConfig
from mixwright.training.fit import fit
from mixwright.training.stage import ParamGroup, Stage
from mixwright.training.watching import Watcher


class Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(1))


def loss(model: Point, batch: Batch) -> Tensor:
    return (model.a - batch.targets.float()).square().sum()


def look(model: nn.Module) -> dict[str, float]:
    assert not torch.is_grad_enabled()
    return {"a": float(model.a), "nothing": float("nan")}


def far(numbers: Mapping[str, float]) -> dict[str, str]:
    return {"far": f"a is {numbers['a']:.2f}; come back"} if numbers["a"] > 0.25 else {}


def watched(**changes: object) -> Stage:
    group = ParamGroup(select=("a",), lr=0.1)
    return Stage(name="w", groups=(group,), steps=6, warmup=0.0, objective=loss, watch=look, alarms=far, **changes)


def test_numbers_are_logged_and_an_alarm_is_heard_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = Batches([1.0], lambda rows: Batch("causal", {}, torch.tensor(rows), len(rows)), batch_size=1, seed=0)
    with caplog.at_level(logging.WARNING, "mixwright"):
        fit(Point(), watched(), data, config=TrainConfig(log_every=1), folder=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [round(line["a"], 1) for line in lines] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert all(line.keys() == {"step", "loss", "a"} for line in lines)  # NaN is no JSON
    (record,) = caplog.records
    assert record.getMessage() == "stage w, step 3: far: a is 0.30; come back"


def test_an_alarm_that_comes_back_is_heard_again(caplog: pytest.LogCaptureFixture) -> None:
    model, watcher = Point(), Watcher(watched())
    for step, value in enumerate((0.3, 0.4, 0.1, 0.5)):
        model.a.data.fill_(value)
        watcher.look(model, step)
    assert [record.args[1] for record in caplog.records] == [0, 3]
