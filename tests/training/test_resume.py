import json
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixwright.methods.phatgoose.config import PhatgooseConfig
from mixwright.methods.phatgoose.recipe import stages
from mixwright.recipe import TrainConfig
from mixwright.training.checkpoint import Checkpoints, Snapshot
from mixwright.training.fit import fit
from mixwright.training.stage import Stage

Make = Callable[..., Any]


class Cut(Exception):
    """The power goes."""


def train(
    make: Make, batches: Make, config: PhatgooseConfig, folder: Path, cut: int | None = None, **options: Any
) -> dict[str, Tensor]:
    """Stage expert with dropout in the backbone and held-out choice; `cut` ends it inside that step."""
    stage, backbone = stages(config)[0], make("causal", attention_dropout=0.2)
    rule = Stage(
        **{**{f: getattr(stage, f) for f in stage.__dataclass_fields__}, "choose_every": 2, **options.pop("rule", {})}
    )
    passes: list[int] = []

    def objective(model: nn.Module, batch: Any) -> Tensor:
        if model.training:
            passes.append(1)
            if cut is not None and len(passes) > cut:
                raise Cut
        return stage.objective(model, batch)

    assert rule.build is not None and rule.harvest is not None
    model = rule.build(backbone, 0, None)
    rule = Stage(**{**{f: getattr(rule, f) for f in rule.__dataclass_fields__}, "objective": objective})
    settings = TrainConfig(batch_size=2, checkpoint_every=2, log_every=1)
    fit(model, rule, batches("causal"), config=settings, folder=folder, validation=batches("causal"), **options)
    return {
        name: tensor
        for site, (a, b, _) in rule.harvest(model).factors.items()
        for name, tensor in ((f"{site}.a", a), (f"{site}.b", b))
    }


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("cut", [1, 3, 4, 5])
def test_a_run_that_was_cut_off_resumes_to_the_same_bits(
    cut: int, backbone: Make, batches: Make, small: PhatgooseConfig, tmp_path: Path
) -> None:
    whole = train(backbone, batches, small, tmp_path / "whole")
    with pytest.raises(Cut):
        train(backbone, batches, small, tmp_path / "cut", cut=cut)
    assert same(train(backbone, batches, small, tmp_path / "cut", resume=True), whole)
    logs = [(tmp_path / run / "log.jsonl").read_text() for run in ("whole", "cut")]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == small.expert_steps
    assert same(train(backbone, batches, small, tmp_path / "cut", resume=True), whole)  # finished: nothing left to do


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(
    backbone: Make, batches: Make, small: PhatgooseConfig, tmp_path: Path
) -> None:
    runs = [train(backbone, batches, small, tmp_path / str(i), seed=seed) for i, seed in enumerate((1, 1, 2))]
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_another_run_is_refused_by_name_unless_forced(
    backbone: Make, batches: Make, small: PhatgooseConfig, tmp_path: Path
) -> None:
    train(backbone, batches, small, tmp_path, identity={"data": "one"})
    with pytest.raises(ValueError, match="different run: data was one, now two; seed was 0, now 5"):
        train(backbone, batches, small, tmp_path, identity={"data": "two"}, seed=5, resume=True)
    train(backbone, batches, small, tmp_path, identity={"data": "two"}, resume=True, force=True)
    with pytest.raises(ValueError, match="holds a run that reached step-00000006; continue it with resume"):
        train(backbone, batches, small, tmp_path)
    train(backbone, batches, small, tmp_path, seed=5, force=True)


def test_ctrl_c_finishes_the_step_saves_and_stops(
    backbone: Make, batches: Make, small: PhatgooseConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(backbone, batches, small, tmp_path / "whole")
    plain = Checkpoints.save

    def interrupted(self: Checkpoints, snapshot: Snapshot) -> Path:
        if snapshot.step == 2:
            signal.raise_signal(signal.SIGINT)
        return plain(self, snapshot)

    monkeypatch.setattr(Checkpoints, "save", interrupted)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 3 of 6; continue with resume"):
        train(backbone, batches, small, tmp_path / "cut")
    monkeypatch.undo()
    assert same(train(backbone, batches, small, tmp_path / "cut", resume=True), whole)


def checkpoints(folder: Path) -> Checkpoints:
    return Checkpoints(folder, {"seed": "0"})


def snapshot(step: int) -> Snapshot:
    return Snapshot(step=step, tensors={"weights.safetensors": {"a": torch.full((3,), float(step))}})


def test_two_checkpoints_are_kept_and_a_damaged_one_falls_back_to_the_one_before(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoints(tmp_path).save(snapshot(step))
    assert [path.name for path in checkpoints(tmp_path).steps()] == ["step-00000003", "step-00000002"]
    newest = tmp_path / "step-00000003" / "weights.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    found = checkpoints(tmp_path).latest()
    assert found is not None and found.step == 2 and found.tensors["weights.safetensors"]["a"][0] == 2
    for folder in checkpoints(tmp_path).steps():
        (folder / "state.json").write_text("{")
    with pytest.raises(ValueError, match="no checkpoint is whole"):
        checkpoints(tmp_path).latest()


def test_a_save_that_fails_leaves_the_earlier_ones_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints(tmp_path).save(snapshot(1))
    monkeypatch.setattr(
        "mixwright.training.checkpoint.publish_folder", lambda *_: (_ for _ in ()).throw(OSError("gone"))
    )
    with pytest.raises(OSError, match="gone"):
        checkpoints(tmp_path).save(snapshot(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001"]


def test_a_checkpoint_is_json_and_safetensors_and_nothing_else(
    backbone: Make, batches: Make, small: PhatgooseConfig, tmp_path: Path
) -> None:
    train(backbone, batches, small, tmp_path)
    latest = Checkpoints(tmp_path / "checkpoints", {}).steps()[0]
    names = sorted(path.name for path in latest.iterdir())
    assert names == ["best.safetensors", "optimizer.safetensors", "state.json", "weights.safetensors"]
    state = json.loads((latest / "state.json").read_text())
    assert state["step"] == 6 and state["identity"]["code"].startswith("mixwright ")
    shutil.rmtree(tmp_path)
